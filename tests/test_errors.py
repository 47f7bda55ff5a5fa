"""Every setting and every verb, given what cannot be: one line that names it, status 2, no traceback.

The table is made from the schema, so that a new setting is covered by being there.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from iccld.cli import VERBS, main
from iccld.config import Config, config_from, load_config
from iccld.outcome import FORCED
from iccld.programs import configuration
from iccld.programs.launch.local import _pass_signals_on, _status_of_signalled
from iccld.programs.stopped import leave_word, read_word, status_of_stopped
from iccld.runtime.faults.preemption import SIGNALS, Preemption
from iccld.schema import fields_of
from iccld.suggestions import did_you_mean, for_key
from tests.factory import scene_overrides
from tests.forked import Forked

ANY_NUMBER = {"seed"}
"""The numbers that may have any value."""
LENIENT: set[str] = set()
"""The settings whose nonsense is refused later than here, if at all."""
NONSENSE = (-1, math.nan, math.inf, -math.inf, 1e30, 0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its path, its type, and the dataclass that it is a field of."""

    path: str
    kind: Any
    part: type

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def settings_of(part: type, prefix: str = "") -> Iterator[Setting]:
    for name, kind in fields_of(part).items():
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield Setting(f"{prefix}{name}", kind, part)


SETTINGS = list(settings_of(Config))


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def line_of(act: Callable[[], object]) -> str:
    """The one line of the ValueError that this raises."""
    with pytest.raises(ValueError) as found:
        act()
    line = str(found.value)
    assert "\n" not in line and 10 < len(line) < 600, line
    return line


def wrong_types(kind: Any) -> list[Any]:
    """Values that are none of this type; what is given for a text is text."""
    if kind is bool or kind in (int, float) or (isinstance(kind, type) and issubclass(kind, Enum)):
        return ["nonsense", ["a"]]
    if typing.get_origin(kind) is list or typing.get_origin(kind) is dict:
        return ["nonsense", 7]
    return [["a"]] if kind is str else []


def test_the_table_covers_the_schema():
    assert len(SETTINGS) > 150 and {"seed", "stage2.objective.learning_rate"} <= {each.path for each in SETTINGS}
    assert len(SETTINGS) == len({setting.path for setting in SETTINGS})


def test_a_value_of_another_type_is_one_line_that_names_the_setting():
    count = 0
    for setting in SETTINGS:
        for value in wrong_types(setting.kind):
            line = line_of(lambda s=setting, v=value: config_from(nested(s.path, v), where="config.yaml"))
            assert line.startswith("config.yaml: ") and setting.path in line, (setting.path, value, line)
            count += 1
    assert count > 250


def test_an_impossible_number_is_one_line_that_names_the_setting():
    lenient = set()
    for setting in SETTINGS:
        if setting.kind not in (int, float) or setting.path in ANY_NUMBER:
            continue
        refused = []
        for value in NONSENSE:
            if setting.kind is int and not math.isfinite(value):
                continue
            try:
                setting.part(**{setting.name: setting.kind(value)})
            except ValueError as error:
                refused.append(str(error))
        assert not [line for line in refused if "\n" in line], setting.path
        if not [line for line in refused if setting.name in line]:  # a rule about two settings may name the other
            lenient.add(setting.path)
    assert lenient <= LENIENT, sorted(lenient - LENIENT)


def test_a_misspelt_setting_is_named_with_the_one_that_is_meant():
    for setting in SETTINGS:
        known = fields_of(setting.part)
        for wrong in (setting.name + "z", setting.name[:-1] + "_", setting.name.replace("_", "")):
            if wrong in known:
                continue
            path = setting.path.removesuffix(setting.name) + wrong
            near = for_key(path, Config)
            assert near.startswith("; did you mean ") or len(setting.name) <= 3, path
            if wrong == setting.name + "z":
                assert near == f"; did you mean {setting.path}?" or len(setting.name) <= 3, (path, near)


def test_names_that_are_close_to_nothing_have_no_suggestion():
    assert did_you_mean("xylophone", ["train", "config"]) == "" == for_key("xylophone.of", Config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage1.trainer.num_stepz=3", "did you mean stage1.trainer.num_steps?"),
        ("stagee1.trainer.num_steps=3", "did you mean stage1?"),
        ("+sed=3", "did you mean seed?"),
        ("data.source.also={a:{shards:b}}", "data.source.also.a; a + adds a name: +data.source.also={NAME:VALUE}"),
        ("model.encoder.backbone_config={model_type:swin}", "a name: +model.encoder.backbone_config={NAME:VALUE}"),
        ("engine.precision=bf61", "did you mean bf16?"),
        ("experiment=demmo", "did you mean demo?"),
        ("stages=[stage11]", "did you mean stage1?"),
        ("+data.source.also={b:{shardz:x}}", "did you mean data.source.also.b.shards?"),
    ],
)
def test_what_is_close_to_a_setting_a_choice_or_a_file(override: str, words: str):
    assert words in line_of(lambda: load_config([override]))


def test_a_name_is_added_as_the_message_says():
    assert load_config(["+data.source.also={b:{shards:x}}"]).data.source.also["b"].shards == "x"
    config = load_config(["model.encoder.pretrained=", "+model.encoder.backbone_config={model_type:swin}"])
    assert config.model.encoder.backbone_config == {"model_type": "swin"}


def test_saved_settings_that_are_misspelt(tmp_path: Path):
    line = line_of(lambda: config_from({"engine": {"precison": "bf16"}}, where="config.yaml"))
    assert "did you mean engine.precision?" in line


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with, with status 2."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and "Traceback" not in lines[0], (arguments, status, lines)
    return lines[0]


def choices(line: str) -> list[str]:
    found = re.search(r"\(choose from ([^)]*)\)", line)
    assert found, line
    return found[1].replace("'", "").split(", ")


def test_every_verb_refuses_an_option_that_it_does_not_have(capsys: pytest.CaptureFixture[str]):
    verbs = choices(said(["nonsense"], capsys))
    assert {"train", "config", "predict", "shards", "doctor"} <= set(verbs)
    for verb in verbs:
        arguments = (
            ["x"] * 3 if verb == "predict" else [] if verb in ("train", "config", "profile", "doctor") else ["x"]
        )
        assert "iccld" in said([verb, *arguments, "--no-such-option"], capsys)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian", "did you mean train?"),
        ("shards mak", "did you mean make?"),
        ("checkpoint exprt a b", "did you mean export?"),
        ("predict a b c --attention sdp", "did you mean sdpa?"),
        ("shards", "ACTION"),
        ("evaluate", "RUN_OR_MODEL"),
        ("train --config-dir /nowhere", "/nowhere"),
        ("train --secrets /nowhere", "/nowhere"),
        ("evaluate /nowhere", "/nowhere"),
        ("predict /nowhere tests out", "/nowhere"),
        ("goodput /nowhere", "/nowhere"),
        ("ablate /nowhere --output out", "/nowhere"),
        ("checkpoint list /nowhere", "/nowhere"),
        ("checkpoint verify /nowhere", "/nowhere"),
        ("shards info /nowhere", "/nowhere"),
        ("shards verify /nowhere", "/nowhere"),
        ("shards index /nowhere", "/nowhere"),
        ("submit --settings /nowhere train", "/nowhere"),
    ],
)
def test_what_is_misspelt_or_missing_is_one_line(command: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert words in said(command.split(), capsys)


@pytest.mark.parametrize("text", ["a: [1\nb: 2\n", "seed: 1\nseed: 2\n", "seed: *x\n", "a: b: c\n", "\tseed: 1\n"])
@pytest.mark.parametrize(
    "command", ["config --config-dir {0} experiment=mine", "submit --settings {1} train", "ablate {1}"]
)
def test_a_broken_file_is_named_with_its_line(
    text: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "experiment/mine.yaml"
    file.parent.mkdir()
    file.write_text(text)
    line = said([*command.format(tmp_path, file).split(), *(["--output", "x"] if "ablate" in command else [])], capsys)
    assert re.search(rf"{re.escape(str(file))}:[12]: ", line), line


@pytest.mark.parametrize(
    ("variables", "by_hand", "configured", "status"),
    [
        ({}, True, 0, 130),
        ({}, False, 0, 0),
        ({}, True, 7, 7),
        ({"WORLD_SIZE": "2"}, True, 0, 0),  # the launcher ends with 130
        ({"ICCLD_OUTCOME": "file"}, True, 0, 85),
    ],
)
def test_the_status_of_a_run_that_was_stopped(
    variables: dict[str, str], by_hand: bool, configured: int, status: int, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WORLD_SIZE", "ICCLD_OUTCOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load_config([f"preemption.exit_status={configured}"])
    assert status_of_stopped(config, "stopped", by_hand=by_hand) == status


@pytest.mark.parametrize(
    ("number", "left", "status"),
    [
        (signal.SIGTERM, "0", 0),
        (signal.SIGTERM, "85", 85),
        (signal.SIGINT, "0", 130),
        (signal.SIGINT, "85", 85),
        (signal.SIGTERM, None, FORCED),  # the ranks did not save in the time that the agent gives them
        (signal.SIGQUIT, "", FORCED),
    ],
)
def test_the_status_of_a_launch_that_was_stopped(
    number: signal.Signals, left: str | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    word = tmp_path / "status"
    monkeypatch.setenv("ICCLD_LAUNCHED", str(word))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert left is None or leave_word(int(left or 7)) == int(left or 7)
        assert word.exists() == (rank == "0" and left is not None)
    if left == "":
        word.write_text("")  # torn
    assert _status_of_signalled(number, read_word(word)) == status


@pytest.mark.parametrize("by", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_end_of_a_terminal_asks_the_ranks_to_save_unless_nohup_keeps_it_away(
    by: signal.Handlers,
):
    before, came = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}, []
    try:
        signal.signal(signal.SIGHUP, by)
        _pass_signals_on()
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))  # as torch's agent does, later
        signal.raise_signal(signal.SIGHUP)
        assert came == [signal.SIGTERM] * (by is signal.SIG_DFL)
        signal.raise_signal(signal.SIGUSR1)
        assert came[-1:] == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_is_told_from_other_signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for sent, by_hand in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        with Preemption() as preemption:
            signal.raise_signal(sent)
            assert preemption.came and preemption.by_hand is by_hand
    for number, handler in before.items():  # a process that was asked to end ignores further signals
        signal.signal(number, handler)


def test_a_library_that_is_missing_is_said_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "iccld.config")
    assert said(["train"], capsys) == "iccld train needs hydra; pip install 'iccld[train]'"


MINIMAL = {
    "train": "sed=1", "launch": "x", "submit": "x", "evaluate": "/nowhere", "predict": "/nowhere tests out",
    "export": "/nowhere out.pt2", "config": "sed=1", "shards": "verify /nowhere", "checkpoint": "list /nowhere",
    "profile": "sed=1", "doctor": "--secrets /nowhere", "goodput": "/nowhere", "report": "/nowhere", "runs": "/nowhere",
    "compare": "/nowhere /there", "ablate": "/nowhere --output out",
}  # fmt: skip
"""Words that each verb refuses."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_the_traceback_by_debug_alone(verb: str, capsys: pytest.CaptureFixture[str]):
    words = MINIMAL[verb].split()
    plain = said([verb, *words], capsys)
    assert main([verb, "--debug", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == plain


def test_debug_stands_behind_an_action_too(capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "verify", "/nowhere", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_ctrl_c_is_one_line_and_130(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(configuration, "run", interrupted)
    assert main(["config", *options]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "iccld config: stopped by Ctrl-C" and (len(lines) == 1) == (not options)


FAULT = """
import iccld.cli, iccld.programs.configuration as verb
verb.run = lambda arguments: {}[str(arguments.overrides)]
iccld.cli.run()
"""


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_fault_of_the_program_is_one_line_and_a_file(options: list[str], tmp_path: Path):
    command = [sys.executable, "-c", FAULT, "config", *options, "seed=1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    kept = list(tmp_path.glob("iccld_traceback_*.txt"))
    assert done.returncode == 1 and done.stdout == ""
    if options:
        assert done.stderr.startswith("Traceback") and not kept
    else:
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        assert "a fault of the program" in done.stderr and "KeyError" in done.stderr
        assert str(kept[0]) in done.stderr and "Traceback" in kept[0].read_text()


def test_a_training_ended_by_ctrl_c_ends_with_130(scene_shards: Path, tmp_path: Path):
    settings = [*scene_overrides(scene_shards, tmp_path), "stages=[stage1]", "stage1.trainer.num_steps=500"]
    log, command = tmp_path / "log", ["train", *settings, "data.validation.shards="]
    run = Forked("iccld", command, environment=dict(os.environ), log=log)
    while run.poll() is None and "step 2/500" not in log.read_text():
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130 and "Traceback" not in log.read_text()
    assert (tmp_path / "stage1/checkpoints/latest").is_file()


def test_the_page_has_every_status():
    page = (Path(__file__).parents[1] / "docs/hangs.md").read_text().partition("## Exit statuses")[2]
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["0", "1", "2", "75", "76", "130", "141"]
