"""Output that nobody reads, or that cannot be written, of real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iccld.outcome import AGAIN
from iccld.tables import WIDTH, table_console
from tests.data.factory import make_set


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("set"), 3).location


def run(arguments: list[str], output: int, *, unbuffered: str = "") -> tuple[int, str]:
    """Status and stderr of `iccld` with its stdout at a descriptor."""
    command = [sys.executable, "-m", "iccld", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "verb", [["shards", "info"], ["shards", "info", "--keys"], ["shards", "verify", "--workers", "2"], ["config"]]
)
def test_a_reader_that_is_gone_is_silence_and_the_status_of_sigpipe(
    location: str, verb: list[str], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    place = [] if verb == ["config"] else [location]
    assert run([*verb, *place], writer, unbuffered=unbuffered) == (141, "")
    os.close(writer)


def test_help_too_and_errors_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert run(["--help"], writer) == (141, "")
    command = [sys.executable, "-m", "iccld", "shards", "info", "nowhere"]
    assert subprocess.run(command, stdout=writer, stderr=writer, check=False).returncode == 141
    os.close(writer)


def test_a_full_disk_is_said(location: str) -> None:
    with Path("/dev/full").open("w") as full:
        status, errors = run(["shards", "info", location], full.fileno())
    assert status == AGAIN and "No space left on device" in errors and "Traceback" not in errors
    command = [sys.executable, "-m", "iccld", "shards", "info", location]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == AGAIN


def test_a_server_s_broken_pipe_is_no_reader_that_is_gone() -> None:
    code = "from iccld import cli\nfrom iccld.programs import configuration\n"
    code += "def fail(*_): raise BrokenPipeError(32, 'of a server')\nconfiguration.run = fail\n"
    command = [sys.executable, "-c", f"{code}raise SystemExit(cli.main(['config']))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (AGAIN, "iccld config: [Errno 32] of a server\n")


def test_tables_are_made_where_the_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert table_console().width == WIDTH
