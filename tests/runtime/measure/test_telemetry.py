"""Telemetry ends no run, whatever becomes of it."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from iccld.node import uptime
from iccld.runtime.measure import telemetry
from iccld.runtime.measure.telemetry import Lines, WandbRun, append, write_event
from iccld.runtime.settings import WandbMode

RUN = """
import sys
from pathlib import Path
from iccld.node import uptime
from iccld.runtime.measure.telemetry import WandbMode, WandbRun
run = WandbRun()
run.start(WandbMode.online, project="p", id="abc", name="n", dir=Path(sys.argv[1]), config={})
run.tell(lambda run: run.log({"loss": 1.0}, step=1))
run.finish()
print("trained")
"""


def with_wandb(folder: Path, *, timeout_s: float = 150, **environment: str) -> str:
    """Return the output of a process that asks for wandb online; it must go on and end."""
    # A test in this process may have left wandb's service behind, which the new process would join.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(folder), "NETRC": str(folder / "none")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        env=inherited | home | environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=True,
    )  # fmt: skip
    assert "trained" in done.stdout and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_without_login_it_is_offline(tmp_path: Path):
    said = with_wandb(tmp_path)
    assert said.count("wandb: online did not start") == 1 and "wandb sync" in said
    assert list(tmp_path.glob("wandb/offline-run-*-abc"))


@pytest.fixture
def silent_server() -> Iterator[str]:
    """One that takes a request and never answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(200)

        do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_does_not_answer_costs_a_bounded_time(tmp_path: Path, silent_server: str):
    begin = time.monotonic()
    said = with_wandb(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=silent_server)
    assert time.monotonic() - begin < 2 * telemetry.START_S + 30
    assert "wandb: online did not start" in said and "wandb sync" in said, said


@pytest.mark.parametrize(
    "module", ["raise ImportError('no wandb')", "import sys; sys.exit(3)", "1 / 0", "raise KeyboardInterrupt"]
)
def test_a_package_that_is_missing_or_broken_is_one_line(tmp_path: Path, module: str):
    (tmp_path / "wandb.py").write_text(module)
    said = with_wandb(tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert len(said.splitlines()) == 1 and "training go on without it" in said


def test_what_fails_or_hangs_in_the_middle_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(telemetry, "CALL_S", 0.2)
    for fault in (lambda: 1 / 0, lambda: time.sleep(3), lambda: sys.exit(2)):
        run = WandbRun()
        run._run = object()
        for _ in range(3):
            run.tell(lambda _, fault=fault: fault())
        assert len(capfd.readouterr().err.splitlines()) == 1
    WandbRun().start(WandbMode.disabled)


def limited_to(size: int, path: Path, lines: list[str]) -> None:
    """Add the lines, in a child, to a file that may not grow beyond `size`."""
    if not (child := os.fork()):
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        for line in lines:
            try:
                append(path, line)
            except OSError:
                continue
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("size", range(0, 60, 7))
def test_lines_appear_whole_or_not_at_all(tmp_path: Path, size: int):
    path, lines = tmp_path / "metrics.jsonl", ["a" * 15 + "\n", "b" * 22 + "\n", "c" * 3 + "\n"]
    limited_to(size, path, lines)
    found = path.read_text() if path.exists() else ""
    assert all(f"{line}\n" in lines for line in found.splitlines()) and len(found) <= size


def test_a_torn_line_stays_alone(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "ev')
    write_event(tmp_path, "saved", step=3)
    torn, line = path.read_text().splitlines()
    assert torn == '{"time": 1, "ev' and json.loads(line)["step"] == 3 and json.loads(line).keys() > uptime().keys()


def test_lines_that_found_no_room_come_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    lines = Lines(tmp_path / "gone" / "metrics.jsonl")
    for step in range(3):
        lines.add({"step": step})
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and "metrics.jsonl" in said and "tries again" in said
    (tmp_path / "gone").mkdir()
    lines.add({"step": 3})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [0, 1, 2, 3]


def test_an_event_that_cannot_be_written_is_said(capfd: pytest.CaptureFixture[str]):
    write_event(Path("/dev/null"), "saved", step=1)
    assert "events.jsonl" in (said := capfd.readouterr().err) and "'saved'" in said


def test_a_link_put_there_in_mid_run_ends_nothing_and_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for name in ("events.jsonl", "metrics.jsonl", "wandb"):
        (tmp_path / name).symlink_to("/nowhere")
    lines = Lines(tmp_path / "metrics.jsonl")
    for step in range(3):
        lines.add({"step": step})
        write_event(tmp_path, "saved", step=step)
    run = WandbRun()
    run.start(WandbMode.offline, dir=tmp_path)
    run.tell(lambda run: run.log({}))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and all("is a link to /nowhere" in line for line in said), said
    lines.path.unlink()
    lines.add({"step": 3})
    assert len(lines.path.read_text().splitlines()) == 4


def test_what_wandb_says_is_without_secrets(capfd: pytest.CaptureFixture[str]):
    run = WandbRun()
    run._run = object()

    def fail(_: object) -> None:
        raise ValueError("no answer from https://user:s3cret@host/x?key=s3cret")

    run.tell(fail)
    said = capfd.readouterr().err
    assert "https://host/x" in said and "s3cret" not in said
