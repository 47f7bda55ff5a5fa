"""Secrets are planted in every place where settings hold some; afterwards every file and message is searched."""

import base64
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from iccld.cli import main, parse
from iccld.config import Config, load_config, to_dict, to_yaml
from iccld.programs.arguments import settings_of
from iccld.programs.submit.work import hide_secrets, jobs_of
from iccld.reading import read_secrets, write_secrets
from iccld.redact import HIDDEN, redacted
from iccld.slurm.config import Work
from tests.factory import make_scene_shards, scene_overrides
from tests.forked import Forked
from tests.planted import ENVIRONMENT, OF_REDIRECT, OPTION, PASSWORD, PLANTED, SIGNATURE, TOKEN


def config_with_secrets() -> Config:
    config = load_config(["model=tiny", "dataset=scenes"])
    config.data.source.shards = f"https://u:{PASSWORD}@host/a?sig={SIGNATURE}"
    config.data.storage.options = {"secret": OPTION}
    return config


def test_settings_leave_memory_without_secrets() -> None:
    config = config_with_secrets()
    assert PLANTED not in to_yaml(config) and PLANTED not in json.dumps(to_dict(config))
    data = to_dict(config)["data"]
    assert data["source"]["shards"] == "https://host/a" and data["storage"]["options"] == {"secret": HIDDEN}
    assert config.data.storage.options == {"secret": OPTION}, "those in memory stay as they are"
    assert redacted({"a": [f"https://host?{TOKEN}", 1, None]}) == {"a": ["https://host", 1, None]}


def test_a_file_of_secrets_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_bytes("data.storage.options.key=é".encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ValueError, match=f"--secrets {path}: .*; save it as UTF-8"):
        read_secrets(path)


def test_a_submitted_job_finds_its_secrets_in_a_file_of_the_user_alone(tmp_path: Path) -> None:
    words = ["model=tiny", f"run_dir={tmp_path}", f"data.source.shards=https://u:{PASSWORD}@host/a"]
    words += [f"+data.storage.options.secret={OPTION}", "data.target.shards=/b"]
    command = ["train", *words]
    variants = [("a", ["seed=1"]), ("b", [f"data.target.shards=https://u:{TOKEN}@host/b"])]
    for work, count in (
        (jobs_of(command, num_ranks=1)[0][1], 1),
        (jobs_of(command, num_ranks=1, variants=variants)[0][1], 3),
    ):
        hidden, files = hide_secrets("job", work)
        assert PLANTED not in str(hidden) and len(files) == count
        for original, shown in zip((work, *work.variants), (hidden, *hidden.variants), strict=True):
            [option] = [word for word in shown.arguments if word.startswith("--secrets=")]
            path = Path(option.partition("=")[2])
            path.parent.mkdir(exist_ok=True)
            write_secrets(path, files[path])
            assert path.stat().st_mode & 0o777 == 0o600
            assert sorted([*shown.arguments, *read_secrets(path)]) == sorted([*original.arguments, option])
    path = tmp_path / "shown.secrets"
    write_secrets(path, ["a=1"])
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"others can read it; `chmod 600"):
        read_secrets(path)


def hidden_and_shown(folder: Path, *words: str) -> tuple[list[str], list[str], Path]:
    """The settings in the job's file, those in its script, and the file."""
    work = Work(run_dir=str(folder), code=str(folder), folder=str(folder), arguments=("train", *words))
    shown, files = hide_secrets("job", work)
    [(path, hidden)] = files.items()
    return hidden, [word for word in shown.arguments[1:] if not word.startswith("--")], path


def test_the_order_of_words_keeps_its_meaning(tmp_path: Path) -> None:
    secret = "data.storage.options.secret=PLANTED-a"
    for words in (
        ["data.storage.options={secret:PLANTED-b}", secret, "seed=1", "data.storage={timeout_s:5.0}"],
        ["data.storage={timeout_s:5.0,options:{secret:PLANTED-b}}", "seed=2", secret, "data.storage.timeout_s=7"],
        ["data.storage.timeout_s=7", "data.storage={timeout_s:5.0}", secret, "data.storagex=1"],
    ):
        hidden, shown, _ = hidden_and_shown(tmp_path, *words)
        related = [word for word in words if word.startswith("data.storage") and "storagex" not in word]
        assert hidden == related and shown == [word for word in words if word not in related]
        write_secrets(path := tmp_path / "x.secrets", hidden)
        arguments = parse(["train", *shown[:1], f"--secrets={path}", *shown[1:]])
        assert settings_of(arguments) == [*hidden, *shown], "the command line comes last, and wins"


def test_a_later_submission_leaves_a_waiting_job_its_secrets(tmp_path: Path) -> None:
    one, two = (f"data.storage.options.secret={OPTION}{number}" for number in (1, 2))
    of_one, of_two = (hidden_and_shown(tmp_path, word)[2] for word in (one, two))
    assert of_one != of_two and of_one == hidden_and_shown(tmp_path, one)[2]


@pytest.mark.parametrize("verb", [["train"], ["config"], ["evaluate", "run"], ["submit", "--dry-run", "train"]])
def test_a_file_of_secrets_that_cannot_be_read_is_one_line(
    tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    (open_to_all := tmp_path / "open").write_text("seed=1")
    open_to_all.chmod(0o644)
    for path, why in ((tmp_path / "none", "No such file"), (open_to_all, "others can read it; `chmod 600")):
        assert main([*verb, f"--secrets={path}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"iccld {verb[0]}: ") and why in said and str(path) in said and said.count("\n") == 1


class Server(ThreadingHTTPServer):
    """Serves a folder to whoever knows the password (if it has one); remembers what it was sent."""

    daemon_threads = True

    def __init__(self, folder: Path, *, password: str = "", leads_to: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.leads_to, self.heard = folder, leads_to, list[str]()
        self.wanted = f"Basic {base64.b64encode(f'u:{password}'.encode()).decode()}" if password else None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.heard.append(f"{self.path} {self.headers}")
        path = self.path.partition("?")[0]
        if self.server.wanted and self.headers.get("Authorization") != self.server.wanted:
            self.send_error(401)
        elif self.server.leads_to:
            self.send_response(302)
            self.send_header("Location", self.server.leads_to.replace("PATH", path))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(self.server.folder / path.strip("/"))

    def _send(self, path: Path) -> None:
        if not path.is_file():
            self.send_error(404)
            return
        data, total = path.read_bytes(), path.stat().st_size
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), total - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what was sent is remembered."""


class World(NamedTuple):
    """A user's home, the words that name the sets on servers, and those servers."""

    home: Path
    settings: list[str]
    source: Server
    leading: Server
    other: Server

    def python(self, *words: str) -> tuple[int, str]:
        """Run Python as that user, and return its status and words, which are kept in the home, too."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.home,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        return self._kept(done.returncode, f"{done.stdout}\n{done.stderr}\n")

    def iccld(self, *words: str) -> tuple[int, str]:
        """Run a command as that user, forked."""
        log = self.home / "log.txt"
        status = Forked("iccld", [*words], environment=self._environment(), log=log, folder=self.home).wait(300)
        return self._kept(status, log.read_text())

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG"))}
        return environment | {
            "HOME": str(self.home), "AWS_SECRET_ACCESS_KEY": ENVIRONMENT, "ACCELERATE_USE_CPU": "true"
        }  # fmt: skip

    def _kept(self, status: int, said: str) -> tuple[int, str]:
        with (self.home / "said.txt").open("a") as file:
            file.write(said)
        return status, said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, home = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("home")
    make_scene_shards(folder)
    source, other = Server(folder, password=PASSWORD), Server(folder)
    leading = Server(folder, password=PASSWORD, leads_to=f"http://{other.place}PATH?sig={OF_REDIRECT}")
    settings = [
        f"data.source.shards=http://u:{PASSWORD}@{source.place}/source?sig={SIGNATURE}",
        f"data.validation.shards=http://u:{PASSWORD}@{leading.place}/validation?sig={SIGNATURE}",
    ]
    yield World(home, settings, source, leading, other)
    for server in (source, leading, other):
        server.shutdown()
        server.server_close()


TRAIN = """
import sys
from iccld.config import load_config
from iccld.programs.train.train import train
words, secret = sys.argv[1:-3], sys.argv[-3:]
config = load_config(words)
config.data.source.shards, config.data.validation.shards = (word.partition("=")[2] for word in secret[:2])
config.data.storage.options = {"secret": secret[2]}
sys.exit(0 if train(config) else 1)
"""


def refuse_here(
    world: World, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gives commands that are refused, in this process, and keeps what they say in the home."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.home / "cache"))
    place = world.source.place
    for command in (
        ["train", *words, f"data.storage.options.secret={OPTION}", "nonsense=1"],
        ["shards", "info", f"http://u:{PASSWORD}@{place}/nowhere?sig={SIGNATURE}"],
        ["shards", "info", f"http://u:wrong-PLANTED@{place}/source?sig={SIGNATURE}"],
        ["shards", "info", f"http://u:PLANTED/@{place}/source?sig={SIGNATURE}"],
        ["shards", "info", f"simplecache::http://u:{PASSWORD}@{place}/source"],
        ["goodput", "run", f"data.source.shards=http://u:{PASSWORD}@{place}/source?sig={SIGNATURE}"],
        [f"http://u:{PASSWORD}@{place}/source?sig={SIGNATURE}"],
        ["shards", "info", f"http:/u:{PASSWORD}@{place}/source?sig={SIGNATURE}"],
        ["shards", "info", f"u:{PASSWORD}@{place}/source"],
        ["shards", "info", f"ftp://u:{PASSWORD}@{place}/source"],
    ):
        try:
            status = main(command)
        except SystemExit as end:  # argparse's
            status = end.code
        said = capsys.readouterr()
        assert status == 2 and "iccld" in said.err
        with (world.home / "said.txt").open("a") as file:
            file.write(said.out + said.err)


def test_no_secret_of_a_run_is_written_or_said_or_sent_elsewhere(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *scene_overrides(world.source.folder, Path("run")), "stage=segmentation", "metrics.wandb=offline",
        "stage1.trainer.num_steps=2", "stage1.trainer.evaluate_every=1", "stage1.trainer.checkpoint.save_every=1",
        "evaluation.max_images=1", "preemption.exit_status=0",
    ]  # fmt: skip
    status, said = world.python("-c", TRAIN, *words, *world.settings, OPTION)
    assert status == 0, said
    simple = [word.partition("?")[0] + f"?{TOKEN}" for word in world.settings]  # that every parser takes
    secret_option = f"+data.storage.options.secret={OPTION}"
    commands: list[tuple[int, list[str]]] = [
        (0, ["evaluate", "run", simple[1], secret_option.lstrip("+")]),
        (2, ["evaluate", "run"]),
        (0, ["profile", *words, *simple, secret_option, "--num-steps", "2", "--num-warmup", "1", "--num-traced", "1"]),
        (0, ["submit", "--dry-run", "train", *words, *simple, secret_option]),
        (0, ["config", *words, *simple, secret_option]),
        (0, ["checkpoint", "export", "run/stage1/checkpoints/step_00000002", "model"]),
    ]
    for expected, command in commands:
        status, said = world.iccld(*command)
        assert status == expected, f"{command}: {said[-4000:]}"
    refuse_here(world, [*words, *simple], monkeypatch, capsys)
    files = [path for path in world.home.rglob("*") if path.is_file()]
    assert {"config.yaml", "manifest.json", "results.json", "events.jsonl", "profile.json", "said.txt"} <= {
        p.name for p in files
    }
    assert any(path.suffix == ".wandb" for path in files)
    leaks = [str(path) for path in files if PLANTED.encode() in path.read_bytes()]
    assert not leaks
    others = "".join(world.other.heard)
    assert OF_REDIRECT in others and "Authorization" not in others, "the redirect was followed, without the password"
    heard = "".join([*world.source.heard, *world.leading.heard, others])
    assert SIGNATURE in heard and ENVIRONMENT not in heard and OPTION not in heard
    assert PASSWORD not in others and SIGNATURE not in others


@pytest.mark.parametrize(
    "leads_to",
    [
        f"ftp://u:{PASSWORD}@host/a?sig={OF_REDIRECT}",
        f"http://[broken?sig={OF_REDIRECT}",
        f"http://127.0.0.1:9/a?sig={OF_REDIRECT}",
        f"PATH?sig={OF_REDIRECT}",
        f"file:///etc/passwd?sig={OF_REDIRECT}",
        f"data:text/plain,{OF_REDIRECT}?sig={OF_REDIRECT}",
    ],
)
def test_what_a_redirect_names_is_not_said(tmp_path: Path, leads_to: str, caplog: pytest.LogCaptureFixture) -> None:
    from iccld.data.storage.base import StorageConfig, StorageError
    from iccld.data.storage.open import open_storage

    server = Server(tmp_path, leads_to=leads_to)
    storage = open_storage(f"http://{server.place}/a", StorageConfig(timeout_s=5.0, retry_for_s=1.0))
    with pytest.raises(StorageError) as caught:
        storage.read("x.tar", 0, 1)
    server.shutdown()
    assert f"http://{server.place}/a/x.tar" in str(caught.value)
    assert f"sig={OF_REDIRECT}" not in str(caught.value) + caplog.text


READ_ENCRYPTED = """
import sys
from iccld.data.storage.base import StorageConfig
from iccld.data.storage.open import open_storage
open_storage(sys.argv[1], StorageConfig(timeout_s=5.0, retry_for_s=1.0)).read("x.tar", 0, 1)
"""


def test_a_redirect_from_https_to_http_is_not_read(tmp_path: Path) -> None:
    """Anyone on the way could put other bytes there."""
    plain, encrypted = Server(tmp_path), Server(tmp_path)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        certificate,
        "-days",
        "1",
    ]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    encrypted.socket = context.wrap_socket(encrypted.socket, server_side=True)
    (tmp_path / "x.tar").write_bytes(b"x")

    def read(leads_to: str = "") -> subprocess.CompletedProcess[str]:
        encrypted.leads_to = leads_to
        return subprocess.run(
            [sys.executable, "-c", READ_ENCRYPTED, f"https://{encrypted.place}"],
            env=os.environ | {"SSL_CERT_FILE": str(certificate)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    try:
        assert read().returncode == 0
        assert "leads from https to http, which anyone can read" in read(f"http://{plain.place}/PATH").stderr
    finally:
        for server in (plain, encrypted):
            server.shutdown()
