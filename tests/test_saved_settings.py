"""Settings of every kind go through a run's file, a checkpoint's manifest and an export, and nothing in them is read
as anything but data.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccld.config import Config, config_from, differences, load_config, read_config, to_dict, to_yaml
from iccld.data.config import ClassSetConfig, DataConfig, DatasetConfig, OnError, SetConfig
from iccld.data.storage.base import StorageConfig
from iccld.models.settings import DecoderConfig, EncoderConfig, LatentKind, ModelConfig
from iccld.runtime.settings import MetricsConfig, PreemptionConfig, WandbMode
from iccld.settings import TrainerConfig
from iccld.stages.settings import AdversarialConfig, AdversaryInput, SegmentationConfig, Weights
from iccld.stages.table import STAGES
from iccld.uda.settings import EmaProfileConfig

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["${oc.env:HOME}", "${", "\\${seed}", "1e3", "007", "on", "null", "2024-01-05", "a=b", "~", "ü"]),
).filter(lambda text: text != "???")
SHARE = st.sampled_from([1e-7, 1e-5, 0.1, 1 / 3, 5e-324, 1.0])
SETS = st.builds(SetConfig, name=TEXT, shards=TEXT.filter(bool), weight=SHARE, first_percent=SHARE, keys=TEXT)
DATASETS = st.builds(DatasetConfig, name=TEXT, shards=TEXT.filter(bool), weight=SHARE,
                     also=st.dictionaries(TEXT.filter(bool), SETS, max_size=2))  # fmt: skip
CLASSES = st.one_of(
    st.just(ClassSetConfig()),
    st.builds(lambda names, last: ClassSetConfig(names, {**{i: i for i in range(len(names))}, 18: last % len(names)}),
              st.lists(TEXT, min_size=2, max_size=5), st.integers(0, 9)),
)  # fmt: skip
PLAIN = st.one_of(TEXT, st.booleans(), st.integers(-9, 9), SHARE, st.lists(st.integers(0, 9), max_size=3))
ENCODERS = st.builds(
    EncoderConfig, pretrained=TEXT, width=st.sampled_from([8, 64]), image_std=st.lists(SHARE, min_size=3, max_size=3),
    backbone_config=st.dictionaries(TEXT, st.one_of(PLAIN, st.dictionaries(TEXT, PLAIN, max_size=2)), max_size=3),
)  # fmt: skip
DATA = st.builds(DataConfig, source=DATASETS, target=DATASETS, class_set=CLASSES, max_bad_share=st.just(1e-7),
                 on_error=st.sampled_from(OnError),
                 storage=st.builds(StorageConfig, options=st.dictionaries(TEXT, TEXT)))  # fmt: skip
CONFIGS = st.builds(
    lambda name, seed, stages, data, encoder, latent, wandb, adversary, rate, size, weights, grace: Config(
        run_dir=name, seed=seed, stages=stages, data=data, initial_model=name,
        model=ModelConfig(encoder=encoder, latent=latent, decoder=DecoderConfig(width=64)),
        stage1=replace(Config().stage1, objective=SegmentationConfig(encoder_learning_rate=rate),
                       trainer=TrainerConfig(micro_batch_size=size)),
        stage2=replace(Config().stage2, objective=AdversarialConfig(
            adversary_input=adversary, learning_rate=rate,
            ema_profile=EmaProfileConfig(widths=[0.05, 0.1], snapshot_every=2))),
        metrics=MetricsConfig(wandb=wandb, wandb_project=name), preemption=PreemptionConfig(grace_s=grace),
        inference=replace(Config().inference, weights=weights),
    ),
    TEXT, st.integers(-(2**63), 2**63), st.sampled_from([["stage1"], [*STAGES]]), DATA, ENCODERS,
    st.sampled_from(LatentKind), st.sampled_from(WandbMode), st.sampled_from(AdversaryInput), SHARE,
    st.sampled_from([1, 2, "auto"]), st.sampled_from(Weights), st.sampled_from([600.0, math.inf]),
)  # fmt: skip


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
def test_every_kind_of_settings_comes_back(tmp_path: Path, config: Config):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    of_manifest = config_from(json.loads(json.dumps(to_dict(config))), where="manifest.json")
    for saved in (read_config(path), of_manifest):  # without secrets, which no file holds
        assert to_dict(saved) == to_dict(config) and not differences(config, saved)


@pytest.mark.parametrize(
    "line",
    [
        "run_dir: ${oc.env:SECRET}",
        "run_dir: '${oc.env:SECRET}'",
        "data: {source: {shards: '${oc.env:SECRET}', also: {a: {shards: '${oc.env:SECRET}'}}}}",
        "data: {storage: {allow_schemes: ['${oc.env:SECRET}']}}",
        "model: {encoder: {backbone_config: {a: [{b: '${oc.env:SECRET}'}]}}}",
        "data: {class_set: {names: ['${oc.env:SECRET}', b], of_train_id: {0: 0, 1: 1}}}",
        "run_dir: '\\${oc.env:SECRET}'",
        "run_dir: '${oc.decode:${oc.env:SECRET}}'",
    ],
)
def test_a_saved_file_reads_no_environment(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "planted")
    path = tmp_path / "config.yaml"
    path.write_text(line)
    for overrides in ([], ["seed=1", f"run_dir={tmp_path}"]):
        text = json.dumps(to_dict(read_config(path, overrides)))
        assert "planted" not in text
    assert "oc.env:SECRET" in json.dumps(to_dict(read_config(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: ${oc.env:SECRET}", "seed"),
        (b"seed: !!python/object/apply:os.getpid []", ":1: has a tag"),
        (b"seed: &a 1\nstatistics_samples: *a", ":2: has an alias"),
        (b"seed: 1\nseed: 2", ":2: names 'seed' twice"),
        (b"- 1", "no `key: value` lines"),
        (b"", "no `key: value` lines"),
        (b"run_dir: \xff", ":1: is not UTF-8"),
        (b"a" * (2 << 20), "has more than"),
        (b"unknown: 1", "unknown"),
        (b"run_dir: ???", "run_dir"),
        (b"data: 3", "data"),
        (b"data: {source: {also: {1: {shards: x}}, shards: y}}", "1"),
        (b"1: 2", "1"),
        (b"null: 2", "None"),
        (b"stages: {a: b}", "stages"),
        (b"stages: [stage9]", "stage9"),
        (b"data: {class_set: {of_train_id: {a: 0}}}", "of_train_id"),
        (b"_target_: os.system", "_target_"),
        (b"data: {crop_size: [[8, 8]]}", "crop_size"),
        (b"seed: 1" + b"0" * 5000, "no YAML"),
    ],
)
def test_a_broken_file_is_one_line(content: bytes, message: str, tmp_path: Path):
    (path := tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r".*") as raised:
        read_config(path)
    said = str(raised.value)
    assert message in said and said.startswith(str(path)) and "\n" not in said, said


LINES = to_yaml(Config()).splitlines()
ODD = st.one_of(TEXT, st.sampled_from([
    "- ", "  x: 1", "[", "}", "\t", "*a", "&a b", "!!set {a}", "? ", ": ", "...", "---", "1: 2", "null:", "_type: x",
    "${a}", "???",
]))  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(LINES) - 1), odd=ODD, what=st.sampled_from(["instead", "before", "value"]))
def test_whatever_a_line_becomes_is_settings_or_a_refusal(tmp_path: Path, place: int, odd: str, what: str):
    lines: list[Any] = list(LINES)
    if what == "before":
        lines.insert(place, odd)
    else:
        lines[place] = odd if what == "instead" else f"{lines[place].partition(':')[0]}: {odd}"
    (path := tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    try:
        assert isinstance(read_config(path), Config)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(("saved", "read"), [(False, "none"), (True, "whole"), ("auto", "auto")])
def test_settings_of_an_earlier_version_are_read(tmp_path: Path, saved: Any, read: str):
    values = to_dict(Config())
    values["engine"]["compile"] = saved
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.yaml").engine.compile.value == read


def test_settings_from_before_the_remedies_are_the_papers(tmp_path: Path):
    papers = load_config(["stage2=paper"])
    values = to_dict(papers)
    for name in ("condition", "residual_steps", "residual_step"):
        del values["model"][name]
    for name in ("diffusion_loss", "pure_noise_share", "deterministic", "task_weight", "corruption"):
        del values["stage2"]["objective"][name]
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.yaml") == papers
    assert read_config(tmp_path / "config.yaml", ["stage2.objective.task_weight=1"]).stage2.objective.task_weight == 1
