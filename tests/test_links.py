"""No verb writes or deletes through a link that lies in a folder which it was given.

A verb is run once where nothing is hostile, and all that it writes, makes and removes is noted. Then links to copies in
somebody's home, dangling links and hard links are planted at all these names, and the verb is run again. Where it
refuses a link, which it must name, that one gives way to what it hides, until the verb does its work. The home must
always be as it was.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import iccld.slurm
from iccld.cli import main
from iccld.config import load_config
from iccld.data.storage.cache import CacheConfig, SampleCache
from iccld.durable import is_real_folder
from iccld.programs.submit import work
from tests.factory import scene_overrides

KINDS = ("copy", "something else", "dangling", "hard link")
RANDOM = re.compile(r"\.[0-9a-f]{8}\.tmp|^tmp")
EVENTS = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}
QUICK = ["stage=source_only", "stage1.trainer.num_steps=2", "stage1.trainer.checkpoint.save_every=1"]
QUICK += ["stage1.objective.ema_profile={widths:[0.05],snapshot_every:1}", "evaluation.max_images=1"]
watched: list[tuple[Path, set[str]]] = []


def note(event: str, arguments: Any) -> None:
    """An audit hook. It cannot be taken away again, and notes nothing while nobody watches."""
    if not watched or event not in EVENTS:
        return
    if event == "open" and not arguments[2] & 0b11:  # neither O_WRONLY nor O_RDWR
        return
    root, names = watched[-1]
    for path in map(str, arguments[: EVENTS[event]]):
        if path.startswith(f"{root}/") and not RANDOM.search(Path(path).name):
            names.add(path.removeprefix(f"{root}/"))


sys.addaudithook(note)


@contextmanager
def noted(root: Path) -> Iterator[set[str]]:
    """The names below the root that are written, made or removed, and the folders that they lie in."""
    names: set[str] = set()
    watched.append((root, names))
    try:
        yield names
    finally:
        watched.pop()
    names |= {str(parent) for name in names for parent in Path(name).parents if str(parent) != "."}


def state_of(home: Path) -> dict[str, Any]:
    """All that is in a home: names, times, rights and contents."""
    found = [home, *home.rglob("*")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in found}


class Trap:
    """A folder that a verb is given, with links at `names` to the home. `finished`: as the verb has left it."""

    def __init__(self, root: Path, home: Path, names: set[str], finished: Path, kind: str) -> None:
        self.root, self.home, self.names, self.finished, self.kind = root, home, names, finished, kind
        self.numbers = count()
        self.planted: dict[str, Path | None] = {}  # to what lay there before
        self.plant(Path())

    def plant(self, folder: Path) -> None:
        for name in sorted(name for name in self.names if Path(name).parent == folder):
            if self.kind == "hard link" and self._is_folder(name):
                (self.root / name).mkdir(exist_ok=True)
                self.plant(Path(name))
            else:
                self._plant(name)

    def _is_folder(self, name: str) -> bool:
        return (self.finished / name).is_dir() or any(other.startswith(f"{name}/") for other in self.names)

    def _plant(self, name: str) -> None:
        place, target = self.root / name, self.home / f"{next(self.numbers)}" / Path(name).name
        if self.kind != "dangling":
            self._fill(name, target, as_folder=self._is_folder(name) != (self.kind == "something else"))
        self.planted[name] = None
        if place.exists():
            self.planted[name] = place.rename(self.root.with_name("kept") / f"{next(self.numbers)}")
        place.hardlink_to(target) if self.kind == "hard link" else place.symlink_to(target)

    def _fill(self, name: str, target: Path, *, as_folder: bool) -> None:
        """Write what the verb would find or leave there; if that is nothing, something with its names."""
        target.parent.mkdir()
        if not as_folder:
            copy = self.finished / name
            target.write_bytes(copy.read_bytes() if copy.is_file() else b"precious")
            return
        shutil.copytree(self.finished / name, target) if (self.finished / name).is_dir() else target.mkdir()
        for child in (Path(other).name for other in self.names if Path(other).parent == Path(name)):
            if not (target / child).exists():
                (target / child).write_text("precious")

    def give_way(self, said: str) -> None:
        """Put back what lay in the place of the link that is named, and plant in it."""
        named = [name for name in self.planted if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w./-]*\w)", said)]
        assert named, f"no link is named: {said}"
        name = max(named, key=len)
        kept = self.planted.pop(name)
        (self.root / name).unlink(missing_ok=True)
        if kept:
            kept.rename(self.root / name)
        elif self._is_folder(name):
            (self.root / name).mkdir()
        if self._is_folder(name):
            self.plant(Path(name))


def check_no_link_is_followed(
    verb: Callable[[Path], int],
    start: Path,
    folder: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    *,
    depth: int = 10,
) -> None:
    """`verb` acts on a copy of `start`, and ends with a status. Links are planted down to `depth`."""
    finished, root, home = folder / "finished", folder / "given", folder / "home"
    for copy in (finished, root):
        shutil.copytree(start, copy)
    with noted(finished) as names:
        assert verb(finished) == 0, capsys.readouterr().err
    made = (str(path.relative_to(finished)) for path in finished.rglob("*"))
    names |= {name for name in made if not (start / name).exists()}
    names = {name for name in names if len(Path(name).parts) <= depth}
    home.mkdir()
    (folder / "kept").mkdir()
    trap, status = Trap(root, home, names, finished, kind), None
    for _ in range(2 * len(names)):
        before = state_of(home)
        capsys.readouterr()
        status = verb(root)
        after = state_of(home)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not changed, changed
        if status == 0:
            return
        trap.give_way("".join(capsys.readouterr()))
    raise AssertionError(f"the verb ends with {status}, whatever gives way")


def without(folder: Path) -> None:
    """Remove a real folder."""
    if is_real_folder(folder):
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def trained(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *scene_overrides(scene_shards, folder), *QUICK]) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_index(scene_shards: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    start = tmp_path / "start"
    start.mkdir()
    for tar in (scene_shards / "target").glob("*.tar"):
        shutil.copy(tar, start)

    def index(folder: Path) -> int:
        without(folder / "index")  # it would be found finished
        return main(["shards", "index", str(folder), "--workers", "1"])

    check_no_link_is_followed(index, start, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_make(scene_shards: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    """The folder holds `making/`, as after an interruption: without it, what is not empty is refused."""
    start = tmp_path / "start"
    (start / "making").mkdir(parents=True)
    words = ["--dataset", "gta5", "--input", str(scene_shards / "gta5"), "--samples-per-shard", "6", "--workers", "1"]

    def make(folder: Path) -> int:
        without(folder / "index")
        if not os.path.lexists(folder / "making"):
            (folder / "making").mkdir()
        return main(["shards", "make", *words, "--output", str(folder)])

    check_no_link_is_followed(make, start, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_train(trained: Path, scene_shards: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    """The run was cut off after its first checkpoint, so that it goes on and ends."""
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    for gone in ("stage1/final", "stage1/checkpoints/step_00000002", "report"):
        shutil.rmtree(start / gone)
    for gone in ("stage1/ema/step_00000002.safetensors", "config.yaml"):  # which names another folder
        (start / gone).unlink()

    def train(folder: Path) -> int:
        return main(["train", *scene_overrides(scene_shards, folder), *QUICK])

    check_no_link_is_followed(train, start, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate(trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    words = ["evaluation.max_images=1"]
    check_no_link_is_followed(lambda run: main(["evaluate", str(run), *words]), trained, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_goodput(trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    check_no_link_is_followed(lambda folder: main(["goodput", str(folder)]), trained, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_predict(trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    images, start = tmp_path / "images", tmp_path / "start"
    (images / "seq").mkdir(parents=True)
    start.mkdir()
    Image.new("RGB", (32, 32)).save(images / "seq" / "a.png")
    words = ["predict", str(trained), str(images)]
    check_no_link_is_followed(lambda folder: main([*words, str(folder)]), start, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["export", "convert"])
def test_copies_of_checkpoints(
    trained: Path, tmp_path: Path, action: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    """The output is in a folder that has been prepared by somebody else."""
    start, checkpoint = tmp_path / "start", trained / "stage1" / "checkpoints" / "step_00000002"
    start.mkdir()
    options = ["--num-files", "2"] if action == "convert" else []
    name = "step_00000002" if action == "convert" else "model"

    def copy(folder: Path) -> int:
        without(folder / name)  # it would be refused
        return main(["checkpoint", action, str(checkpoint), str(folder / name), *options])

    check_no_link_is_followed(copy, start, tmp_path, kind, capsys)


SBATCH = """#!/bin/sh
for script; do :; done
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
sed -n "s/^#SBATCH --output=//p" "$script" | sed "s/%x/$name/; s/%j/7/" | while read -r log; do echo said >>"$log"; done
echo 7
"""


@pytest.mark.parametrize("kind", KINDS)
def test_submit(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scene_shards: Path
):
    """The sbatch of this test takes everything, and its SLURM opens the log as the real one would."""
    sbatch, start = tmp_path / "bin" / "sbatch", tmp_path / "start"
    for folder in (sbatch.parent, start):
        folder.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    composed = cache(lambda words, folder: load_config(words, config_dir=folder))  # it takes longer than what is tested
    monkeypatch.setattr(work, "load_config", lambda words, config_dir: composed(tuple(words), config_dir))

    def submit(folder: Path) -> int:
        return main(["submit", "train", *scene_overrides(scene_shards, folder)])

    check_no_link_is_followed(submit, start, tmp_path, kind, capsys, depth=2)


@pytest.mark.parametrize("kind", KINDS)
def test_cache(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    def fill(folder: Path) -> int:
        try:
            cache = SampleCache(CacheConfig(str(folder), max_gib=0.01))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        for number in range(3):
            cache.put(f"{number}", b"sample")
            assert cache.get(f"{number}") in (None, b"sample")
            cache.discard(f"{number}")
            cache.put(f"{number}", b"sample")
        return 0

    start = tmp_path / "start"
    start.mkdir()
    check_no_link_is_followed(fill, start, tmp_path, kind, capsys)


@pytest.mark.parametrize("place", ["slurm", "slurm/job_7", "slurm/job_7/alive", "slurm/job_7/alive/0"])
def test_the_job_script_deletes_nothing_behind_a_link(tmp_path: Path, place: str):
    home, script = tmp_path / "home", Path(iccld.slurm.__file__).parent / "job.sh"
    for name in ("0/file", "alive/0/file", "job_7/alive/0/file", "file"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("precious")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(home)
    before = state_of(home)
    command = f'scontrol() {{ echo node1; }}; source "{script}"; begin_attempt "{tmp_path}/run"'
    variables = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True, check=False)
    assert state_of(home) == before, "a link was followed"
    if place != "slurm/job_7/alive/0":  # which gives way itself
        assert done.returncode == 2 and f"{place} is a link" in done.stdout
