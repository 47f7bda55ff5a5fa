"""Faults of the world end a run in one line with status 75; what was saved stays whole, and the run can go on."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from iccld.outcome import AGAIN, REFUSED
from iccld.runtime.checkpoint.manifest import STEP_FOLDER, verify
from tests.factory import scene_overrides
from tests.forked import Forked

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


def command(shards: Path, run_dir: Path, *more: str, steps: int = 4) -> list[str]:
    lengths = [f"num_steps={steps}", "global_batch_size=2", "micro_batch_size=1", "checkpoint.save_every=2"]
    settings = [*scene_overrides(shards, run_dir), "stage=source_only", "data.validation.shards=", *more]
    return ["train", *settings, *(f"stage1.trainer.{length}" for length in lengths)]


def start(words: list[str], log: Path, *, before: str = "", launch: bool = False) -> Forked | subprocess.Popen[bytes]:
    """Start a verb; by a Python of its own if the shell does something `before`, or the launcher is wanted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not (before or launch):
        return Forked("iccld", words, environment=environment, log=log)
    program = ["-m", "iccld", *(["launch", "2"] if launch else [])]
    shell = ["bash", "-c", f'{before} exec "$0" "$@"', sys.executable, *program, *words]
    with log.open("w") as file:
        return subprocess.Popen(shell, cwd=ROOT, stdout=file, stderr=file, env=environment)


def until(log: Path, words: str, timeout_s: float = 120) -> None:
    limit = time.monotonic() + timeout_s
    while words not in log.read_text():
        assert time.monotonic() < limit, log.read_text()[-3000:]
        time.sleep(0.02)


def said_besides_progress(log: Path) -> list[str]:
    """Return the lines of a log without figures of steps and without what is done for how long, as "starting, 0:10"."""
    progress = re.compile(r"stage1 step .*|.*, \d+:\d\d")
    return [line for line in log.read_text().splitlines() if not progress.fullmatch(line)]


def workers_of(process: Forked | subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return its loader workers, also if a server has started them."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "tracker" not in (line := " ".join(child.cmdline())) and ("forkserver" not in line or not child.children())
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_worker_is_one_line_at_any_moment(scene_shards: Path, tmp_path: Path, seed: int) -> None:
    log, draw = tmp_path / "log", random.Random(seed)
    process = start(command(scene_shards, tmp_path / "run", "data.num_workers=2", steps=100_000), log)
    try:
        until(log, "step 1/")
        time.sleep(draw.random() * 2)
        draw.choice(workers_of(process)).send_signal(signal.SIGKILL)
        assert process.wait(60) == AGAIN, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    said = said_besides_progress(log)
    assert len(said) == 1 and "a loader worker" in said[0], said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_named_and_what_was_saved_stays(
    scene_shards: Path, tmp_path: Path, small_disk: Path
) -> None:
    log, run_dir = tmp_path / "log", small_disk / "run"
    process = start(command(scene_shards, run_dir, steps=400), log)
    until(log, "step 5/")
    filler = small_disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], check=False, stderr=subprocess.DEVNULL)
    assert process.wait(120) == AGAIN, log.read_text()[-3000:]
    said = said_besides_progress(log)
    assert "Traceback" not in log.read_text() and 1 <= len(said) <= 3, said
    assert all("No space left" in line and str(run_dir) in line and "ake room" in line for line in said), said
    checkpoints = run_dir / "stage1" / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    assert STEP_FOLDER.fullmatch(newest.name) and verify(newest).step % 2 == 0
    filler.unlink()
    again = start(command(scene_shards, run_dir, steps=400), log)
    until(log, f"step {verify(newest).step + 1}/")
    again.terminate()
    assert again.wait(60) == 0


@pytest.mark.parametrize("launch", [False, True])
def test_too_few_open_files_are_said_with_what_is_needed(scene_shards: Path, tmp_path: Path, launch: bool) -> None:
    log, few = tmp_path / "log", 20 if launch else 32
    process = start(
        command(scene_shards, tmp_path / "run", "data.num_workers=4"), log, before=f"ulimit -n {few};", launch=launch
    )
    assert process.wait(60) == REFUSED
    (line,) = said_besides_progress(log)
    assert f"the limit of open files is {few}" in line and "need " in line and "ulimit -n" in line


def test_a_soft_limit_of_open_files_is_raised(scene_shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(scene_shards, tmp_path / "run", "data.num_workers=4"), log, before="ulimit -Sn 32;")
    assert process.wait(120) == 0, log.read_text()


def test_local_ranks_listen_on_the_loopback_interface_alone(scene_shards: Path, tmp_path: Path) -> None:
    """The host's name need not resolve."""
    log = tmp_path / "log"
    unshared = subprocess.run(["unshare", "-u", "hostname", "x"], check=False, capture_output=True).returncode == 0
    before = 'exec unshare -u bash -c \'hostname node-without-dns && exec "$0" "$@"\' "$0" "$@";' if unshared else ""
    process = start(command(scene_shards, tmp_path / "run", steps=100_000), log, before=before, launch=True)
    try:
        until(log, "step 2/")
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [
            connection.laddr
            for member in family
            for connection in member.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening and {address.ip for address in listening} <= {"127.0.0.1", "::1"}, listening
    finally:
        process.terminate()
        assert process.wait(60) == 0
