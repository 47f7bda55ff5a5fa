"""Faults between here and the shards: those of servers, and of the people who set them up."""

import os
import random
import re
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from iccld.data.storage.base import MissingShard, StorageConfig, StorageError
from iccld.data.storage.open import open_storage
from tests.data.conftest import Site
from tests.services import FaultyServer

Start = Callable[..., FaultyServer]
CONTENT = np.random.default_rng(0).bytes(1_000_000)
PATIENT = StorageConfig(timeout_s=2.0, retry_for_s=60.0)
HASTY = StorageConfig(timeout_s=2.0, retry_for_s=5.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(CONTENT)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iccld.data.storage.remote.FIRST_WAIT_S", 0.01)


@pytest.fixture(params=["http", "s3"])
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    """Options of a bucket that anyone may read, for the servers that speak that much of S3."""
    return {"anon": "true"} if request.param == "s3" else {}


def open_at(server: FaultyServer, options: dict[str, str], config: StorageConfig):
    if not options:
        return open_storage(server.url, config)
    settings = StorageConfig(config.timeout_s, config.retry_for_s, {"endpoint_url": server.url, **options})
    return open_storage("s3://set", settings)


def test_every_read_arrives_though_a_tenth_of_the_requests_fails(
    folder: Path, faulty_server: Start, options: dict[str, str]
):
    server = faulty_server(folder.parent if options else folder, share=0.0, seed=1)
    storage, draw = open_at(server, options, PATIENT), random.Random(2)
    storage.size("a.tar")  # the client of S3 is slow to make
    server.share, server.requests, asked = 0.1, 0, storage.counters["requests"]
    places = [(draw.randrange(len(CONTENT) - 5000), draw.randint(1, 5000)) for _ in range(200)]
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        arrived = list(pool.map(lambda place: storage.read("a.tar", *place), places))
    assert arrived == [CONTENT[offset : offset + size] for offset, size in places]
    failed = server.failed.total()
    assert failed > 10 and set(server.failed) == {"500", "hang", "half"}
    # No request that is not ours: neither aiohttp nor s3fs repeats by itself.
    assert storage.counters["retries"] == failed
    assert storage.counters["requests"] - asked == server.requests == len(places) + failed
    assert time.monotonic() - start < 10 + failed * PATIENT.timeout_s


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "Service Unavailable"),
        ("429", "429"),
        ("hang", r"no answer within 2 s"),
        ("half", "IncompleteRead|Payload|ends after"),
    ],
)
def test_a_read_that_never_succeeds_ends_in_time_and_says_all(
    folder: Path, faulty_server: Start, options: dict[str, str], fault: str, cause: str
):
    server = faulty_server(folder.parent if options else folder, share=1.0, faults=fault)
    storage, start = open_at(server, options, HASTY), time.monotonic()
    with pytest.raises(StorageError, match=cause) as caught:
        storage.read("a.tar", 10, 100)
    message, place = str(caught.value), "s3://set" if options else server.url
    attempts = storage.counters["requests"]
    assert message.startswith(f"{place}/a.tar: bytes 10-109: failed after {attempts} attempts (")
    assert message.endswith("); check the server, the URL and data.storage.") and "\n" not in message
    assert attempts == storage.counters["retries"] + 1 > 2
    assert time.monotonic() - start < HASTY.retry_for_s + HASTY.timeout_s + 1


def test_without_time_for_retries_there_is_one_attempt(folder: Path, faulty_server: Start, options: dict[str, str]):
    server = faulty_server(folder.parent if options else folder, share=1.0, faults="500")
    storage = open_at(server, options, StorageConfig(retry_for_s=0.0))
    with pytest.raises(StorageError, match=r"bytes 10-109: failed \("):
        storage.read("a.tar", 10, 100)
    assert server.requests == 1 and storage.counters == {"requests": 1, "retries": 0, "bytes": 0}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("400", "the server answered 400 Bad Request; check the URL"),
        ("401", r"bytes 0-8: access is denied \(401 Unauthorized\); check the credentials"),
        ("403", r"bytes 0-8: access is denied \(403 Forbidden\); check the credentials"),
        ("shift", r"the server answers with other bytes \('bytes 1-9/1000000'\) than were asked for"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(folder: Path, faulty_server: Start, fault: str, message: str):
    server = faulty_server(folder, share=1.0, faults=fault)
    with pytest.raises(StorageError, match=message):
        open_storage(server.url, PATIENT).read("a.tar", 0, 9)
    assert server.requests == 1


def test_connections_are_used_again(folder: Path, faulty_server: Start):
    server = faulty_server(folder, share=0.0)
    storage = open_storage(server.url)
    for offset in range(0, 500_000, 50_000):
        storage.read("a.tar", offset, 50_000)
    assert server.requests == 10 and server.connections == 1


@pytest.fixture(autouse=True, scope="module")
def client_packages() -> None:
    """Loads S3's client before it is timed: that takes seconds on a busy machine, once a process."""
    nowhere = StorageConfig(60.0, 0.0, {"endpoint_url": "http://127.0.0.1:9", "key": "any", "secret": "any"})
    with pytest.raises(StorageError, match="onnect"):
        open_storage("s3://set", nowhere).size("a.tar")


def test_no_one_at_the_address(options: dict[str, str], caplog: pytest.LogCaptureFixture):
    place = StorageConfig(5.0, 4.0, {"endpoint_url": "http://127.0.0.1:9", **options})
    storage = open_storage("s3://set" if options else "http://127.0.0.1:9", place)
    with pytest.raises(StorageError, match=r"failed after \d+ attempts .*onnect.*; check the server"):
        storage.read("a.tar", 0, 1)
    assert [record.getMessage().partition("failed")[0] for record in caplog.records] == [
        f"{storage.location}/a.tar: bytes 0-0: attempt 5 "
    ]


def test_a_server_that_ignores_ranges_is_refused_before_it_sends_all(nginx: Site):
    with (nginx.folder / "huge.tar").open("wb") as file:
        file.truncate(20 << 30)
    storage, start = open_storage(f"{nginx.url}/whole"), time.monotonic()
    with pytest.raises(
        StorageError, match=r"whole/huge\.tar: the server ignores byte ranges .*such as nginx or an obj"
    ):
        storage.read("huge.tar", 1000, 10)
    assert time.monotonic() - start < 2 and storage.size("huge.tar") == 20 << 30
    (nginx.folder / "huge.tar").unlink()
    (nginx.folder / "small.json").write_bytes(b"{}")
    assert storage.read_all("small.json", limit=10) == b"{}", "that it sends all is no harm where all was asked for"
    with pytest.raises(StorageError, match="it is truncated"):
        storage.read("small.json", 1, 10)


def test_credentials_in_a_url_are_used_and_not_shown(nginx: Site):
    (nginx.folder / "b.tar").write_bytes(b"0123")
    secret = nginx.url.replace("//", "//user:hidden@")
    storage = open_storage(f"{secret}/signed/?token=a%2Fb%3Dc")
    assert storage.read("b.tar", 1, 2) == b"12"
    for ask in (lambda: storage.read("none.tar", 0, 1), lambda: storage.read("b.tar", 3, 2)):
        with pytest.raises(StorageError, match=rf"^{nginx.url}/signed/") as caught:
            ask()
        assert "hidden" not in str(caught.value) and "token" not in str(caught.value)
    with pytest.raises(StorageError, match=rf"^{nginx.url}/signed/b\.tar: bytes 0-0: access is denied"):
        open_storage(f"{secret}/signed?token=wrong", PATIENT).read("b.tar", 0, 1)
    assert open_storage(f"{nginx.url}/moved").read("b.tar", 2, 2) == b"23"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anon": "false"}, "NoCredentialsError"),  # "false" is a string, and would be true
        (
            {"anon": "true", "endpoit": "x"},
            "unexpected keyword argument 'endpoit'.*check the server, the URL and data.stor",
        ),
        ({"profile": "absent"}, "ProfileNotFound"),
    ],
)
def test_wrong_options_of_an_object_store_fail_at_once(
    s3: str, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage = open_storage("s3://absent", StorageConfig(options={"endpoint_url": s3, **options}))
    with pytest.raises(StorageError, match=message):
        storage.read("a.tar", 0, 1)
    assert storage.counters["requests"] == 1


def test_a_proxy_of_the_environment_is_used(folder: Path, faulty_server: Start, monkeypatch: pytest.MonkeyPatch):
    server = faulty_server(folder, share=0.0)
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(MissingShard, match=r"http://elsewhere\.invalid/x/a\.tar does not exist"):
        open_storage("http://elsewhere.invalid/x").read("a.tar", 0, 1)
    assert server.requests == 1


class _Liar(BaseHTTPRequestHandler):
    """Answers each path with a lie about sizes; `sent` counts the bytes of all answers."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def do_GET(self) -> None:
        lie = re.split(r"[./]", self.path.strip("/"))[0]
        status, headers, piece = LIES[lie]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            for _ in range(4000):  # 4 GB, or endless but for the test's own sake
                self.wfile.write(piece)
                type(self).sent += len(piece)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def _bomb() -> bytes:
    """The first MiB of deflated zeros, a thousand times as many; blocks that start afresh can be repeated."""
    deflate = zlib.compressobj(9)
    first, other = (deflate.compress(_MANY) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return (first + other * 1100)[: 1 << 20]


_MANY = bytes(1 << 20)
_BOMB = _bomb()
LIES: dict[str, tuple[int, dict[str, str], bytes]] = {
    "huge": (206, {"Content-Range": f"bytes 0-0/{1 << 40}", "Content-Length": "1"}, b"x"),
    "endless": (206, {"Content-Range": "bytes 0-99/100", "Connection": "close"}, _MANY),
    "chunks": (
        206,
        {"Content-Range": "bytes 0-99/100", "Transfer-Encoding": "chunked"},
        b"100000\r\n" + _MANY + b"\r\n",
    ),
    "longer": (206, {"Content-Range": "bytes 0-99/100", "Content-Length": str(1 << 40)}, _MANY),
    "bomb": (206, {"Content-Range": "bytes 0-99/100", "Content-Encoding": "deflate", "Connection": "close"}, _BOMB),
    "whole": (200, {"Content-Length": str(1 << 40)}, _MANY),
    "negative": (206, {"Content-Range": "bytes 0-99/-5", "Content-Length": "100"}, _MANY),
    "words": (500, {"Connection": "close"}, _MANY),
}


@pytest.fixture(scope="module")
def liar() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_sizes_costs_neither_memory_nor_time(liar: str, lie: str):
    storage, start = open_storage(liar, StorageConfig(timeout_s=5.0, retry_for_s=0.0)), time.monotonic()
    before, _Liar.sent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for ask in (lambda: storage.read_all(f"{lie}.json", limit=1000), lambda: storage.read(f"{lie}.tar", 0, 100)):
        try:
            assert len(ask()) == 100, "no more than was asked for"
        except StorageError as error:
            assert len(str(error)) < 500 and str(error).isprintable()
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


def test_an_object_store_that_ignores_ranges_is_refused_before_it_sends_all(liar: str):
    options = {"endpoint_url": liar, "anon": "true"}
    storage = open_storage("s3://whole", StorageConfig(timeout_s=5.0, retry_for_s=0.0, options=options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StorageError, match="the server ignores byte ranges"):
        storage.read("a.tar", 0, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


def test_what_a_server_says_is_short_and_printable(folder: Path):
    class Shouting(_Liar):
        def do_GET(self) -> None:
            self.send_response_only(400, "\x1b[31m" + "a" * 5000)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Shouting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(StorageError) as caught:
        open_storage(f"http://127.0.0.1:{server.server_port}", HASTY).read("a.tar", 0, 1)
    server.shutdown()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
