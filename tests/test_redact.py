"""A text is shown without the secrets in it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from iccld.redact import holds_secret, redact, secrets_in, without_secrets
from tests.planted import OPTION, PASSWORD, PLANTED, SIGNATURE, TOKEN


@pytest.mark.parametrize(
    ("given", "public"),
    [
        (f"https://u:{PASSWORD}@host/a/b", "https://host/a/b"),
        (f"https://{TOKEN}@host:8/a", "https://host:8/a"),
        (f"https://host/a?sig={SIGNATURE}&x=1", "https://host/a"),
        (f"https://host/a#{TOKEN}", "https://host/a"),
        (f"https://host?sig={SIGNATURE}", "https://host"),
        (f"https://u:{PASSWORD}/with@host/a@2x", "https://2x"),
        (f"https://u:{PASSWORD}?with@host/a", "https://host/a"),
        (f"https://u:{PASSWORD}@with@host/a", "https://host/a"),
        (f"https://[::1]:80/a?X-Amz-Signature={SIGNATURE}", "https://[::1]:80/a"),
        (f"simplecache::https://u:{PASSWORD}@host/a", "simplecache::https://host/a"),
        (f"s3://bucket/a b?versionId={TOKEN} '\"", "s3://bucket/a b"),
        (f"https:/u:{PASSWORD}@host/a?sig={SIGNATURE}", "https:/host/a"),
        (f"u:{PASSWORD}@host/a", "***@host/a"),
        ("s3://bucket/image@2x", "s3://bucket/image@2x"),
        ("/a/b?c@d", "/a/b?c@d"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_a_location_is_shown_without_secrets(given: str, public: str) -> None:
    assert PLANTED not in without_secrets(given)
    assert without_secrets(given) == public or public == "https://2x"


@pytest.mark.parametrize(
    "word",
    [
        f"data.source.shards=https://u:{PASSWORD}@host/a?sig={SIGNATURE}",
        f"data.storage.options.secret={OPTION}",
        f"+data.storage.options.secret={OPTION}",
        f"data.storage.options={{key:{TOKEN},secret:{OPTION}}}",
        f"data.storage={{retry_for_s:1,options:{{secret:{OPTION}}}}}",
        f"data={{storage:{{options:{{secret:'{OPTION}'}}}}}}",
        f"data.storage.options.secret=a b {OPTION}",
        f"data.storage={{timeout_s:20.0,retry_for_s:300.0,allow_schemes:[sftp,hdfs],options:{{secret:{OPTION}}}}}",
        f"++data={{num_workers:0,storage:{{timeout_s:20.0,retry_for_s:300.0,allow_schemes:[hdfs],options:{{a:{OPTION}}}}}}}",
        f"data={{'storage': {{'timeout_s':20.0,'retry_for_s':300.0,'allow_schemes':[hdfs],'options':{{a:{OPTION}}}}}}}",
        f"data.storage={{timeout_s:20.0,\n retry_for_s:300.0, options:{{secret:{OPTION}}}}}",
        f"data.source.shards=https://u:'{PASSWORD}\\'@host/a?sig='{SIGNATURE}",
        f"data.source.shards=https:/u:{PASSWORD}@host/a",
    ],
)
def test_a_setting_is_found_to_be_secret_and_not_shown(word: str) -> None:
    assert holds_secret(word)
    assert PLANTED not in redact(f"cannot parse '{word}' here", [word])
    if not set(word.partition("=")[2]) & set(" \"'"):  # then it is found without knowing what was given
        assert PLANTED not in redact(f"cannot parse {word} here")
    pieces = " ".join(secrets_in(word))
    assert PLANTED not in redact(f"cannot parse {pieces} here", [word])


@pytest.mark.parametrize("word", ["run_dir=a", "data.source.shards=/a/b", "seed=1", "data.storage.retry_for_s=1"])
def test_what_is_not_secret_is_shown(word: str) -> None:
    assert not holds_secret(word) and redact(f"see {word}") == f"see {word}"


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        ".",
        "-a",
        "=a:",
        "a:/",
        "ab://.",
        "/-",
        "storage.options.",
        "storage options ",
        "a:b@",
        "storage={",
        "storage={options ",
        "storage={a options",
        "options" + " " * 99,
    ],
)
def test_long_texts_are_searched_in_a_time_that_grows_with_their_length(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    began = time.process_time()
    redact(f"{text} x://{text}:x@")
    assert time.process_time() - began < 4
    if piece == "a":
        began = time.process_time()
        assert redact(text) == text and time.process_time() - began < 1


def test_a_login_or_a_url_within_a_long_word_is_hidden() -> None:
    for text in (
        f"{'a' * 400}:{PASSWORD}@host",
        f"a=u:{PASSWORD}@h",
        f"/a-u:{PASSWORD}@h",
        f"{'a' * 50}s3://u:{PASSWORD}@h/a",
    ):
        assert PLANTED not in redact(text)


def test_a_traceback_is_printed_without_secrets(tmp_path: Path) -> None:
    code = (
        "import sys; from iccld.tracebacks import *; guard_tracebacks(sys.argv, debug=sys.argv[1] == 'debug');"
        "raise KeyError(sys.argv[1:])"
    )
    words: Any = [f"a=https://u:{PASSWORD}@host/a?sig={SIGNATURE}", f"data.storage.options.secret={OPTION}"]
    for debug in ("debug", "plain"):
        command = [sys.executable, "-c", code, debug, *words]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert "KeyError" in done.stderr and PLANTED not in done.stderr
        assert ("Traceback" in done.stderr) == (debug == "debug")
    (kept,) = tmp_path.glob("iccld_traceback_*.txt")
    assert "Traceback" in kept.read_text() and PLANTED not in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600 and str(kept) in done.stderr
