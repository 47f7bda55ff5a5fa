"""A port that a test has been given is not given to another."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ports
from tests.ports import free_port, free_ports


def test_a_port_is_given_once_and_not_while_somebody_listens(monkeypatch: pytest.MonkeyPatch):
    assert len({*free_ports(2), free_port()}) == 3
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(ports, "RANGE", range(port, port + 100))
        assert free_port() > port


def test_another_process_gets_other_ports():
    own = free_ports(3)
    command = [sys.executable, "-c", "from tests.ports import free_ports; print(*free_ports(3))"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert not {int(word) for word in done.stdout.split()} & set(own)
