"""Packages that a small install lacks are named in one line, with the extra that brings them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from iccld.config import load_config
from iccld.extras import EXTRA_OF, remedy, version_of
from iccld.models.iccld import ICCLD
from tests.data.pictures import IMAGES

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"hydra-core": "hydra", "zlib-ng": "zlib_ng", "hydra-submitit-launcher": "hydra_plugins"}
REPLACED = {"zlib_ng", "simplejpeg"}  # by zlib and PIL


def packages(extra: str) -> set[str]:
    names = {re.split(r"[\[><=~;]", line)[0] for line in PROJECT["optional-dependencies"][extra]} - {"iccld"}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_every_package_of_an_extra_for_use_is_named_with_it():
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    brought = {name: extra for extra in extras for name in packages(extra) if name not in REPLACED}
    assert brought == EXTRA_OF


def test_using_a_model_takes_nothing_of_training():
    plain = {re.split(r"[\[><=~;]", line)[0] for line in PROJECT["dependencies"]}
    assert plain == {
        "torch", "numpy", "transformers", "huggingface_hub", "safetensors", "pillow", "pyyaml", "rich"
    }  # fmt: skip


def test_a_package_that_lies_on_the_path_has_no_version():
    """A package may be an unpacked wheel, or a checkout that is used without installing."""
    assert version_of("torch") and version_of("no-package-of-this-name", absent="unknown") == "unknown"


def test_what_is_missing_is_said_with_its_remedy():
    assert remedy(ModuleNotFoundError(name="hydra.core")) == "needs hydra; pip install 'iccld[train]'"
    assert remedy(ModuleNotFoundError(name="s3fs")) == "needs s3fs; pip install 'iccld[s3]'"
    for error in (ModuleNotFoundError(name="iccld.nothing"), ImportError(name="hydra"), ImportError()):
        with pytest.raises(ImportError):
            remedy(error)


USE = f"""
import sys
for name in {sorted({*EXTRA_OF, *REPLACED})}:
    if name != "fsspec":  # which torch brings
        sys.modules[name] = None
import numpy as np, torch
import iccld, iccld.evaluation, iccld.programs.doctor.examine, iccld.programs.shards
from iccld.data.images.decode import decode_image
from iccld.models.iccld import ICCLD
model = ICCLD.from_pretrained(sys.argv[1])
image = torch.from_numpy(np.array(decode_image(open(sys.argv[2], "rb").read()))).permute(2, 0, 1)[None] / 255
print(list(model.segment(image).shape))
"""


def test_a_model_is_used_without_the_packages_of_training(tmp_path: Path):
    model = ICCLD(config=load_config(["model=tiny"]).model, num_classes=2)
    model.save_pretrained(tmp_path / "model", class_names=["a", "b"], palette=[(0, 0, 0), (9, 9, 9)])
    (tmp_path / "street.jpg").write_bytes(IMAGES["jpeg"])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "model"), str(tmp_path / "street.jpg")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.fullmatch(r"\[1, 2, \d+, \d+\]", done.stdout.strip()), done.stderr
