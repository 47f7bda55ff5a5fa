"""Real servers for tests and benchmarks, on free loopback ports: nginx, an S3-compatible one, and one with faults.

Each is a context manager that gives the URL of a folder of files and ends what it started. Needs no pytest.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec

from tests.ports import free_port

START_S, HANG_S = 30.0, 60.0
_NGINX = """
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {home}/access.log; sendfile on; keepalive_requests 100000;
  client_body_temp_path {home}/t1; proxy_temp_path {home}/t2; fastcgi_temp_path {home}/t3;
  uwsgi_temp_path {home}/t4; scgi_temp_path {home}/t5;
  server {{
    listen 127.0.0.1:{port}; root {folder};
    location /denied/ {{ return 403; }}
    location /signed/ {{ alias {folder}/; if ($arg_token != "a%2Fb%3Dc") {{ return 403; }} }}
    location /whole/ {{ alias {folder}/; max_ranges 0; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
  }}
}}
"""


class Unavailable(RuntimeError):
    """A service that cannot be had here; the message says why."""


def install_nginx() -> str:
    """The path of nginx, installed with apt-get where it is missing; raises Unavailable."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    if found := shutil.which("nginx", path=path):
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable("nginx is not installed, and only root can install it: apt-get install nginx-light")
    # In run level 1 the package does not start a server of its own on port 80.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = "apt-get update -q && apt-get install -q -y --no-install-recommends nginx-light"
    done = subprocess.run(["sh", "-c", install], check=False, timeout=300, env=environment, capture_output=True)
    if found := shutil.which("nginx", path=path):
        return found
    raise Unavailable(f"apt-get could not install nginx-light: {done.stderr.decode()[-300:]}")


@contextmanager
def nginx(folder: Path, home: Path) -> Iterator[str]:
    """nginx with `folder` as its root, and its own files in `home`.

    Also: /denied/ answers 403, /signed/ wants ?token=a%2Fb%3Dc as it is, /whole/ ignores ranges, /moved/ redirects.
    """
    program, port = install_nginx(), free_port()
    home.mkdir(parents=True, exist_ok=True)
    settings = _NGINX.format(home=home, folder=folder, port=port)
    if os.geteuid() == 0:  # its workers read what root's tests wrote
        settings = f"user root;{settings}"
    (home / "nginx.conf").write_text(settings)
    command = [program, "-e", f"{home}/error.log", "-p", str(home), "-c", str(home / "nginx.conf")]
    with _process(command, port, home / "error.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def s3_server(home: Path) -> Iterator[str]:
    """An S3-compatible server (moto) without any bucket; its endpoint URL. Credentials are not looked at."""
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "s3.log"
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log):
        yield f"http://127.0.0.1:{port}"


def upload(folder: Path, endpoint: str, bucket: str) -> dict[str, str]:
    """Makes a bucket of the files below a folder; the options with which it is read."""
    options = {"endpoint_url": endpoint, "key": "any", "secret": "any"}
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    filesystem.mkdir(bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        filesystem.pipe(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return options


@contextmanager
def _process(command: list[str], port: int, log: Path) -> Iterator[None]:
    if shutil.which("setpriv"):  # a test run that is killed leaves no servers behind
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        limit = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-500:]}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder by ranges, and fails a share of the GET requests in one of the ways of `faults`.

    These are a status to answer with, "hang", "half" (closes half-way), "shift" (other bytes than were asked for).
    Which request fails how is drawn from `seed`. It runs in threads of this process. `requests` and `failed` count
    what was asked and how it failed.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, *, share: float = 0.1, faults: str = "500 hang half", seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _FaultyHandler)
        self.folder, self.share, self.faults = folder, share, faults.split()
        self.requests, self.connections, self.failed = 0, 0, Counter[str]()
        self._random, self._lock, self.ended = random.Random(seed), threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw_fault(self) -> str:
        """The fault of the next request; empty for none."""
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.share:
                return ""
            fault = self._random.choice(self.faults)
            self.failed[fault] += 1
            return fault

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that lose patience are expected here."""


class _FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer("")

    def do_GET(self) -> None:
        self._answer(self.server.draw_fault())

    def _answer(self, fault: str) -> None:
        if fault == "hang":
            self.server.ended.wait(HANG_S)
            self.close_connection = True
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self._send_range(path, fault)

    def _send_range(self, path: Path, fault: str) -> None:
        total = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), total - 1)) if asked else (0, total - 1)
        if fault == "shift":
            first, last = first + 1, last + 1
        if first >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with path.open("rb") as file:
            file.seek(first)
            body = file.read(last - first + 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
        self.close_connection = self.close_connection or fault == "half"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what failed is counted."""


@contextmanager
def faulty_server(folder: Path, **settings: Any) -> Iterator[FaultyServer]:
    """A running `FaultyServer` of a folder."""
    server = FaultyServer(folder, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
