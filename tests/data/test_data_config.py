from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from iccld.data.config import ClassSetConfig, DataConfig, DatasetConfig
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.validation import read_validation
from tests.data.factory import config, layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": [500, 512]}, r"data.crop_size=\[500, 512\] must be .*multiples of 8 .*; use \[496, 512\]"),
        ({"crop_size": [8]}, r"data.crop_size=\[8\] must be \[height, width\]"),
        ({"crop_size": [0, 8]}, r"use \[8, 8\]"),
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0"),
        ({"rare_class_temperature": 0.0}, "data.rare_class_temperature=0.0 must be at least 1e-06"),
        ({"rare_class_min_pixels": -1}, "data.rare_class_min_pixels=-1 must be at least 0"),
        ({"max_class_share": 0.0}, r"data.max_class_share=0.0 must be above 0 and at most 1"),
        ({"flip": 1.5}, "data.flip=1.5 must be between 0 and 1"),
        (
            {"target_margin_top": 0.5, "target_margin_bottom": 0.5},
            "data.target_margin_top=0.5 and .* must be fractions",
        ),
        ({"class_set": ClassSetConfig(["a"], {0: 0, 19: 0})}, r"data.class_set: \[19\] out of range"),
        ({"class_set": ClassSetConfig(["a", "b"], {0: 0})}, "class_set: 2 names"),
        ({"class_set": ClassSetConfig(["a"], {})}, "class_set: 1 names"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_what_cannot_work_is_said_before_training(folders: dict[str, str], tmp_path: Path) -> None:
    def start(data: DataConfig, **options: Any) -> None:
        TrainingStream(data, seed=0, layout=layout(), **options)

    with pytest.raises(ValueError, match=r"data.source.shards is empty, but a source set is needed; set it"):
        start(config({"source": ""}))
    with pytest.raises(ValueError, match=r"data.target.shards=.*nowhere: there is no such folder; make"):
        start(config({**folders, "target": str(tmp_path / "nowhere")}))
    with pytest.raises(
        ValueError, match=r"data.source.shards=.* has no labels, .* make the shards without --no-labels"
    ):
        start(config({"source": folders["target"]}))
    with pytest.raises(ValueError, match=r"data.target.shards=.* has no labels"):
        start(config(folders), target_labels=True)
    with pytest.raises(ValueError, match=r"data.validation.shards=.* has no labels"):
        read_validation(config(folders, validation=DatasetConfig("v", folders["target"])))
    too_large = (
        r"data.crop_size=\[32, 24\] is larger than sample 'frame_000' of .*source.* \(24x32 pixels; 13 of 13 "
        r"samples are too small\); use at most \[24, 32\]"
    )
    with pytest.raises(ValueError, match=too_large):
        start(config(folders, crop_size=[32, 24]))


def test_the_configuration_is_a_structured_config() -> None:
    given = OmegaConf.create({"crop_size": [8, 16], "class_set": {"names": ["a"], "of_train_id": {0: 0, 3: 0}}})
    built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), given))
    assert isinstance(built, DataConfig) and built.crop_size == [8, 16]
    assert built.class_set.build().names == ("a",)
