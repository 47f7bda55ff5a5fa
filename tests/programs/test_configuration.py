"""`iccld config`: YAML with the meaning of each setting, and the meaning of one."""

import os
import time

import pytest

from iccld.cli import main, parse
from iccld.config import load_config, to_dict
from iccld.plain_yaml import parse_yaml
from iccld.programs.configuration import commented
from iccld.programs.launch.command import split

STRANGE = ["model=tiny", "run_dir=a # b: 'c'"]


@pytest.mark.parametrize("more", ["seed=0", "+data.source.also={other: {shards: somewhere}}"])
def test_comments_change_no_value(more: str):
    config = load_config([*STRANGE, more])
    assert parse_yaml(commented(config), where="the settings") == to_dict(config)


def test_each_setting_has_its_meaning(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "seed=3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "seed: 3  # the seed of every random draw" in shown
    assert shown[shown.index("stages:") - 1] == "# The stages that this run trains."


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed", "  seed (int; default 0)"),
        ("stage2.cache.max_gib", "  stage2.cache.max_gib (float; default 20.0)"),
        ("stage2.objective", "  stage2.objective.photometric.jitter (float; default 0.2)"),
        ("stage2", "  stage2.cache.folder (text; default empty)"),
    ],
)
def test_help_of_a_setting_or_a_section(key: str, line: str, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--help-of", key]) == 0
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("key", ["stage2.cache.x", "x.seed", "stage", "stage2.cache.max_gib.x"])
def test_help_of_what_is_not_there_is_refused(key: str, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--help-of", key]) == 2
    assert f"--help-of {key}: there is no such setting" in capsys.readouterr().err


def test_options_cannot_be_abbreviated(capsys: pytest.CaptureFixture[str]):
    for words in (["predict", "a", "b", "c", "--sliding"], ["checkpoint", "export", "a", "b", "--weight=student"]):
        with pytest.raises(SystemExit):
            parse(words)
        assert f"iccld {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("first", [["2", "--engine", "zero2"], ["2", "--engine=zero2"], ["--engine", "zero2", "2"]])
def test_a_launch_takes_its_engine_before_or_behind_the_number(first: list[str]):
    assert split(parse(["launch", *first, "train", "a=b"])) == (2, "zero2", ["train", "a=b"])


@pytest.mark.parametrize("words", [[], ["2"], ["0", "train"], ["two", "train"], ["2", "--engine"], ["2", "--help"]])
def test_a_launch_without_number_or_verb_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["launch", *words]) == 2
    assert "must be a number of ranks and a verb" in capsys.readouterr().err


def test_an_attempt_begins_with_its_launcher(monkeypatch: pytest.MonkeyPatch):
    """Not with its ranks, which begin seconds later; goodput counts these."""
    monkeypatch.setenv("ICCLD_ATTEMPT_BEGAN", "")
    monkeypatch.delenv("ICCLD_ATTEMPT_BEGAN")
    monkeypatch.setattr("iccld.programs.launch.local.launch", lambda *_: 0)
    before = time.time()
    assert main(["launch", "2", "train"]) == 0
    assert before <= float(os.environ["ICCLD_ATTEMPT_BEGAN"]) <= time.time()
