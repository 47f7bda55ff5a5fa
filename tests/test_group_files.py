"""A broken YAML of the user's own is one line: file, line, what."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from iccld.config import config_from, load_config
from iccld.data.config import DataConfig

HEAD = b"# @package data\n"
BROKEN = {
    "bracket": (HEAD + b"crop_size: [64, 64\nnum_workers: 3\n", 3, "expected ',' or ']'"),
    "tab": (HEAD + b"source:\n\tshards: a\n", 3, "'\\t'"),
    "latin1": (HEAD + "source: {name: ü}\n".encode("latin-1"), 2, "is not UTF-8"),
    "utf16": ("crop_size: [64, 64]\n".encode("utf-16"), 1, "is not UTF-8"),
    "mark": (b"\xef\xbb\xbf" + HEAD + b"crop_size: [64, 64]\n", 1, "byte-order mark"),
    "type": (HEAD + b"crop_size: [64, 64]\nnum_workers: many\n", 3, "'many'"),
    "unknown": (HEAD + b"crop_size: [64, 64]\nnum_wrokers: 3\n", 3, "num_wrokers"),
    "below": (HEAD + b"source:\n  name: a\n  shard: b\n", 4, "'shard' not in 'DatasetConfig'"),
    "twice": (HEAD + b"num_workers: 3\nnum_workers: 4\n", 3, "twice"),
    "list": (b"- a\n- b\n", 1, "holds no settings"),
    "word": (b"hello\n", 1, "holds no settings"),
    "empty": (b"", 1, "begin the file with the line `# @package data`"),
    "interpolation": (HEAD + b"\ncrop_size: ${nope}\n", 3, "nope"),
    "grammar": (HEAD + b"source: {shards: '${a'}\n", 2, "${a"),
    "tag": (HEAD + b"source: {shards: !!python/object/apply:os.system [id]}\n", 2, "has a tag"),
    "date": (HEAD + b"source: {shards: 2024_01_05}\n", 2, "must be text; put it into quotes"),
    "nothing": (HEAD + b"source: null\n", 2, "not Optional"),
    "deep": (HEAD + b"crop_size: " + b"[" * 3000 + b"]" * 3000, 2, "deep"),
    "documents": (HEAD + b"---\nseed: 1\n---\nseed: 2\n", 4, "another document"),
    "default": (HEAD + b"defaults:\n  - nope\nnum_workers: 1\n", 1, "nope"),
    "unfolded": (
        HEAD + b"source: &a [&b [x,x,x,x,x,x,x,x,x,x],*b,*b]\ntarget: [" + b"*a," * 4000 + b"]",
        3,
        "stand for over",
    ),
    "endless": (HEAD + b"source: &a {also: *a}\n", 2, "stand for over"),
    "tagged": (HEAD + b"num_workers: !!bool maybe\n", 0, "no YAML that can be read"),
    "base60": (HEAD + b"num_workers: 1" + b":59" * 100_000, 2, "could not be converted to Integer"),
    "package": (b"crop_size: [64, 64]\n", 1, "begin the file with the line `# @package data`"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name: str, tmp_path: Path):
    content, line, message = BROKEN[name]
    (tmp_path / "dataset").mkdir()
    path = tmp_path / "dataset" / f"{name}.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r".*") as raised:
        load_config([f"dataset={name}"], config_dir=str(tmp_path))
    said = str(raised.value)
    assert said.startswith(f"{path}:{line}: " if line else f"{path}: "), said[:300]
    assert message in said and "\n" not in said, said[:300]


@pytest.mark.parametrize("default", ["nested", "/dataset: nested", "/model@model.encoder: nested"])
def test_a_file_that_another_one_s_defaults_name_is_read_within_the_same_limits(default: str, tmp_path: Path):
    for group in ("dataset", "model"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "nested.yaml").write_bytes(BROKEN["unfolded"][0])
    (tmp_path / "dataset" / "mine.yaml").write_bytes(HEAD + f"defaults:\n  - {default}\n".encode())
    with pytest.raises(ValueError, match=rf"^{tmp_path}/\w+/nested\.yaml:3: has aliases that stand for over"):
        load_config(["dataset=mine"], config_dir=str(tmp_path))


def test_a_file_that_a_packaged_one_would_replace_is_refused(tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    path = tmp_path / "dataset" / "gta5_to_cityscapes.yaml"
    path.write_bytes(HEAD)
    with pytest.raises(ValueError, match=r"the packaged dataset/gta5_to_cityscapes\.yaml would be taken") as raised:
        load_config(["model=tiny"], config_dir=str(tmp_path))
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_no_other_folder_is_searched(sign: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^hydra\.searchpath: .*use --config-dir FOLDER"):
        load_config([f"{sign}hydra.searchpath=[file://{tmp_path}]"])


def test_a_file_that_is_named_like_a_run_is_no_group(tmp_path: Path):
    (tmp_path / "settings").mkdir()
    (tmp_path / "run.yaml").write_text("seeds: [0]\n")
    assert load_config([f"run_dir={tmp_path}/run"], config_dir=f"{tmp_path}/settings").run_dir == f"{tmp_path}/run"


def test_a_program_that_is_hydra_s_composes_beside(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        assert load_config(["model=tiny", "seed=3"]).seed == 3
        assert compose("own") == {"a": 1}
    with pytest.raises(ValueError, match="seed"):
        load_config(["seed=x"])
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("content", [HEAD, HEAD + b"# nothing yet\n\n", HEAD + b"{}\n"])
def test_a_file_may_be_empty(content: bytes, tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_bytes(content)
    config = load_config(["dataset=mine", "seed=3"], config_dir=str(tmp_path))
    assert config.data == DataConfig() and config.seed == 3


def test_aliases_and_numbers_of_ones_own_file_are_good(tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_bytes(
        HEAD + b"rare_class_temperature: 1e-2\ncrop_size: &size [64, 64]\nsource: {name: '${data.target.name}'}\n"
    )
    data = load_config(["dataset=mine", "data.target.name=a=b"], config_dir=str(tmp_path)).data
    assert data.rare_class_temperature == 0.01 and data.source.name == "a=b"


RESOLVED = {
    "oc.env": b"source: {shards: 'http://host/${oc.env:ICCLD_PLANTED}'}\n",
    "oc.decode": b"num_workers: ${oc.decode:'${oc.env:ICCLD_PLANTED}'}\n",
    "oc.create": b"num_workers: ${oc.create:'${oc.env:ICCLD_PLANTED}'}\n",
    "hydra": b"source: {shards: 'http://host/${hydra:runtime.cwd}'}\n",
    "of_a_program": b"source: {shards: 'http://host/${of_a_program:x}'}\n",
    "env_copy": b"source: {shards: 'http://host/${hydra.job.env_set.ICCLD_PLANTED}'}\n",
}


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("name", RESOLVED)
def test_a_file_reads_nothing_of_the_user_s_environment(
    name: str, below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ICCLD_PLANTED", "4711")
    OmegaConf.register_new_resolver("of_a_program", lambda word: word, replace=True)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_bytes(HEAD + RESOLVED[name])
    start = b"# @package _global_\ndefaults:\n  - override /dataset: mine\n"
    start += b"hydra: {job: {env_copy: [ICCLD_PLANTED]}}\n" if name == "env_copy" else b""
    (tmp_path / "experiment" / "own.yaml").write_bytes(start)
    words = ["experiment=own"] if below or name == "env_copy" else ["dataset=mine"]
    with pytest.raises(ValueError, match=r".*") as raised:
        load_config(words, config_dir=str(tmp_path))
    said = str(raised.value)
    assert "4711" not in said and "\n" not in said, said
    if name != "env_copy":
        assert "Unsupported interpolation type" in said and "write the value itself" in said, said
    assert OmegaConf.has_resolver("of_a_program") and OmegaConf.has_resolver("oc.env"), "they are kept for others"
    OmegaConf.clear_resolver("of_a_program")


def test_the_choice_of_a_file_reads_nothing_of_the_user_s_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ICCLD_PLANTED", "mit_b5")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: ${oc.env:ICCLD_PLANTED}\n"
    )
    with pytest.raises(ValueError, match=r"^Error resolving interpolation '\$\{oc\.env"):
        load_config(["experiment=own"], config_dir=str(tmp_path))


@pytest.mark.parametrize("load", [load_config, lambda words: config_from({}, where="x", overrides=words)])
def test_a_word_reads_nothing_of_the_user_s_environment(load: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ICCLD_PLANTED", "4711")
    with pytest.raises(ValueError, match=r"Unsupported interpolation type oc\.env.*write the value itself") as raised:
        load(["seed=${oc.env:ICCLD_PLANTED}"])
    assert "4711" not in str(raised.value) and "\n" not in str(raised.value)
    assert load(["seed=7", "statistics_samples=${seed}"]).statistics_samples == 7
