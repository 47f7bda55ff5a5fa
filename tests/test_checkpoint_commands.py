"""`iccld checkpoint`: what is there, whether it is whole, models and copies out of it."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.cli import main
from iccld.config import load_config
from iccld.models.iccld import ICCLD
from iccld.programs import checkpoint_command
from iccld.programs.evaluate.averaging import write_reconstruction
from iccld.programs.run import hand_off
from iccld.programs.run.hand_off import handed_over
from iccld.programs.train.train import train
from iccld.runtime.checkpoint.manifest import read_manifest, verify
from iccld.runtime.checkpoint.store import is_torn
from iccld.slurm.snapshot import code_hash, copy_code
from tests.factory import scene_overrides

NO_TRAINING_PACKAGES = """
import sys
blocked = "accelerate deepspeed wandb hydra omegaconf xformers kornia webdataset diffusers".split()
sys.modules.update(dict.fromkeys(blocked))  # None: as if it were not installed
from iccld.models.iccld import ICCLD
ICCLD.from_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def run_dir(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of two steps, a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = [f"stage{i}.trainer.{s}" for i in (1, 2) for s in ("num_steps=2", "checkpoint.save_every=1")]
    train(load_config([*scene_overrides(scene_shards, folder), *settings, "data.validation.shards="]))
    return folder


def checkpoint(run_dir: Path, stage: int, step: int) -> Path:
    return run_dir / f"stage{stage}" / "checkpoints" / f"step_{step:08d}"


def test_list_and_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert table.count("ddp x 1") == 4 and table.count("latest") == 2
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": whole") == 4


def test_damage_is_named_and_the_status_says_so(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "stage1" / "checkpoints"
    copy.mkdir(parents=True)
    assert (
        main(["checkpoint", "convert", str(checkpoint(run_dir, 1, 2)), str(copy / "step_00000002"), "--num-files", "2"])
        == 0
    )
    content = bytearray((copy / "step_00000002" / "rank_00001.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "step_00000002" / "rank_00001.safetensors").write_bytes(content)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "rank_00001.safetensors does not match its checksum" in capsys.readouterr().out
    (copy / "step_00000002" / "rank_00000.safetensors").unlink()
    assert main(["checkpoint", "list", str(tmp_path)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_a_table_in_a_pipe_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / ("a" * max(1, 80 - len(str(tmp_path)))) / "step_00000001"
    folder.mkdir(parents=True)
    assert main(["checkpoint", "list", str(folder)]) == 1
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize(("action", "reader"), [("list", read_manifest), ("verify", verify)])
def test_what_a_training_removes_meanwhile_is_not_damaged(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action, reader
):
    copy = Path(shutil.copytree(run_dir / "stage1", tmp_path / "stage1"))

    def removed_before(path: Path) -> Any:
        if (manifest := copy / "checkpoints/step_00000001/manifest.json").exists():
            manifest.unlink()
            threading.Timer(0.3, shutil.rmtree, [manifest.parent]).start()
        return reader(path)

    monkeypatch.setattr(checkpoint_command, reader.__name__, removed_before)
    assert main(["checkpoint", action, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "damaged" not in said and said.count("latest" if action == "list" else ": whole") == 1


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_copy_in_other_files_is_equal_to_the_bit(run_dir: Path, tmp_path: Path, num_files: int):
    assert (
        main(
            [
                "checkpoint",
                "convert",
                str(checkpoint(run_dir, 2, 2)),
                str(tmp_path / "c"),
                "--num-files",
                str(num_files),
            ]
        )
        == 0
    )
    one, other = verify(checkpoint(run_dir, 2, 2)), verify(tmp_path / "c" / "step_00000002")
    assert len(other.manifest["files"]) == num_files
    a, b = one.reader.tensors(""), other.reader.tensors("")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    same = {"step", "stage", "config", "layout", "origin"}
    assert all(one.manifest[key] == other.manifest[key] for key in same)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_an_exported_model_is_the_one_of_that_step(run_dir: Path, tmp_path: Path, stage: int, weights: str):
    output = tmp_path / "model"
    command = ["checkpoint", "export", str(checkpoint(run_dir, stage, 2)), str(output), "--weights", weights]
    assert main(command) == 0
    exported = ICCLD.from_pretrained(output).state_dict()
    final = ICCLD.from_pretrained(run_dir / f"stage{stage}" / "final" / weights).state_dict()
    measured_at_the_end = ("latent_", "condition_") if stage == 1 else ()
    assert exported.keys() == final.keys()
    for name, tensor in exported.items():
        assert name.startswith(measured_at_the_end) or torch.equal(tensor, final[name]), name


def test_an_exported_model_needs_no_training_packages(run_dir: Path, tmp_path: Path):
    output = tmp_path / "model"
    assert main(["checkpoint", "export", str(checkpoint(run_dir, 2, 2)), str(output)]) == 0
    subprocess.run([sys.executable, "-c", NO_TRAINING_PACKAGES, str(output)], check=True)


def test_what_the_user_got_wrong_is_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = str(checkpoint(run_dir, 1, 2))
    for command, message in (
        (["list", str(tmp_path)], "there are no checkpoints in"),
        (["verify", str(tmp_path / "step_00000001")], "there are no checkpoints in"),
        (["export", str(run_dir), str(tmp_path / "x")], "is no checkpoint (no manifest.json)"),
        (["export", whole, str(tmp_path)], "exists; give a folder that does not"),
        (["convert", whole, str(tmp_path / "x"), "--num-files", "0"], "--num-files 0 must be at least 1"),
    ):
        assert main(["checkpoint", *command]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.fixture(params=[0o027, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the umask, and return the rights that it leaves a file."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_the_umask_decides_who_may_read_what_is_exported(run_dir: Path, tmp_path: Path, mode: int):
    for action, options in (("export", []), ("convert", ["--num-files", "2"])):
        assert main(["checkpoint", action, str(checkpoint(run_dir, 1, 2)), str(tmp_path / action), *options]) == 0
        assert modes(tmp_path / action) == {mode}


def test_the_umask_decides_who_may_read_a_run(scene_shards: Path, tmp_path: Path, mode: int):
    average = "stage1.objective.ema_profile={widths:[0.05,0.1],snapshot_every:1}"
    settings = ["stage=source_only", "stage1.trainer.num_steps=1", "data.validation.shards=", average]
    assert main(["train", *scene_overrides(scene_shards, tmp_path / "run"), *settings]) == 0
    write_reconstruction(tmp_path / "run", "stage1", tmp_path / "ema", width=0.07)
    assert modes(tmp_path / "run") == modes(tmp_path / "ema") == {mode}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "../../../elsewhere"}, "weights='../../../elsewhere' must be one of"),
        ({"weights": "/etc"}, "weights='/etc' must be one of"),
        ({"weights": "teacher/../student"}, "must be one of"),
        ({"weights": ["teacher"]}, "must be of type str"),
        ("[" * 100_000, "cannot be read"),
        (None, "is reached by a link"),
    ],
)
def test_a_hand_off_leads_nowhere_else(run_dir: Path, scene_shards: Path, tmp_path: Path, change: Any, words: str):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    path = run / "stage1" / "final" / "hand_off.json"
    if change is None:
        shutil.copytree(path.parent / "teacher", tmp_path / "elsewhere")
        shutil.rmtree(path.parent / "teacher")
        (path.parent / "teacher").symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        handed_over("stage1", load_config(scene_overrides(scene_shards, run)))
    assert "\n" not in str(error.value)


def test_a_run_with_classes_of_its_own_is_resumed_and_exported(scene_shards: Path, tmp_path: Path):
    """Integer keys of its settings are strings in a manifest; so are those of a backbone's labels."""
    settings = [f"stage{i}.trainer.{s}" for i in (1, 2) for s in ("num_steps=2", "checkpoint.save_every=1")]
    settings += ["data.class_set.names=[flat,rest]", "data.validation.shards=", "data.rare_class_sampling=false"]
    settings += [f"+data.class_set.of_train_id={{0: 0, {', '.join(f'{i}: 1' for i in range(1, 19))}}}"]
    settings += ["+model.encoder.backbone_config.id2label={0: a, 1: b}"]
    folder = tmp_path / "runs" / "lr=1,[x] ${y}"
    settings = [
        *scene_overrides(scene_shards, folder),
        *settings,
        f"data.source.also={{more:{{shards:{scene_shards}/source}}}}",
    ]
    settings[-1] = "+" + settings[-1]
    train(load_config(settings))
    for stage in (1, 2):
        (folder / f"stage{stage}" / "checkpoints" / "latest").unlink()
        output = tmp_path / f"model{stage}"
        assert main(["checkpoint", "export", str(checkpoint(folder, stage, 2)), str(output)]) == 0
        card = ICCLD.from_pretrained(output).card
        assert card is not None and card.class_names == ["flat", "rest"]
    (folder / "stage2" / "final").rename(tmp_path / "gone")
    train(load_config(settings))  # goes on from a checkpoint, whose settings it compares
    assert (folder / "stage2/final/teacher/config.json").read_bytes() == (
        tmp_path / "gone/teacher/config.json"
    ).read_bytes()


def test_only_what_a_crash_has_left_of_ours_is_removed(run_dir: Path, tmp_path: Path):
    for made, is_ours in ((run_dir / "stage1" / "final", hand_off.is_ours), (checkpoint(run_dir, 1, 2), is_torn)):
        copy = Path(shutil.copytree(made, tmp_path / made.name))
        assert is_ours(copy)
        (copy / "mine").mkdir()
        (copy / "mine" / "thesis.txt").write_text("precious")
        assert not is_ours(copy)
    left = (tmp_path / "step_00000002").rename(tmp_path / "step_00000001.tmp")
    arguments = [str(checkpoint(run_dir, 1, 1)), str(tmp_path / "step_00000001"), "--num-files", "1"]
    assert main(["checkpoint", "convert", *arguments]) == 0
    assert (left / "mine" / "thesis.txt").read_text() == "precious" and verify(tmp_path / "step_00000001")


@pytest.mark.parametrize(("name", "removed"), [("iccld/cli.py", True), ("mine/thesis.txt", False)])
def test_only_what_a_submission_has_left_of_ours_is_removed(tmp_path: Path, name: str, removed: bool):
    left = tmp_path / f"{code_hash()}.0123abcd.tmp"
    (left / name).parent.mkdir(parents=True)
    (left / name).write_text("")
    os.utime(left, (0, 0))
    assert (copy_code(tmp_path) / "iccld" / "cli.py").is_file()
    assert left.exists() != removed
