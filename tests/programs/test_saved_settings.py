"""`iccld evaluate RUN` of a stranger's RUN: its config.yaml opens nothing that the user has not repeated."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from iccld.config import load_config, to_dict
from iccld.data.config import locations
from iccld.data.storage.base import StorageConfig
from iccld.data.storage.open import SCHEMES, open_storage
from iccld.programs.evaluate.evaluate import saved_settings
from iccld.programs.submit.work import run_dir_of
from tests.test_secrets import Server

EVIL = "http://127.0.0.1:9/val"


def saved(folder: Path, **data: object) -> Path:
    """A run's folder whose saved settings have this data section."""
    values = to_dict(load_config(["model=tiny", "dataset=scenes"]))
    for name, value in data.items():
        values["data"][name] = {**values["data"][name], **value} if isinstance(value, dict) else value
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.parametrize(
    "location", [EVIL, "simplecache://x", "memory://x", "s3://bucket/a", "data://x", "reference://x"]
)
@pytest.mark.parametrize("key", ["shards", "also.more.shards"])
def test_a_server_is_asked_only_if_its_address_is_repeated(tmp_path: Path, location: str, key: str) -> None:
    if key == "shards":
        run = saved(tmp_path, validation={"shards": location})
    else:
        run = saved(tmp_path, validation={"shards": "/a", "also": {"more": {"shards": location}}})
    setting = f"data.validation.{key}"
    with pytest.raises(
        ValueError, match=rf"config.yaml names a set on a server.*repeat the setting: {setting}={location}"
    ):
        saved_settings(run, ["inference.num_steps=[1]"])
    with pytest.raises(ValueError, match="repeat the setting"):
        saved_settings(run, ["data.validation.name=x", "data.validation.shardsx=1"][:1])
    config = saved_settings(run, [f"{setting}={location}"])
    assert location in str(config.data.validation)


def test_a_folder_is_read_and_what_configures_servers_is_not_taken_over(tmp_path: Path) -> None:
    options = {"endpoint_url": EVIL, "cache_storage": "/x", "key": "a"}
    run = saved(
        tmp_path,
        validation={"shards": "/a/b"},
        source={"shards": EVIL},
        storage={"options": options, "allow_schemes": ["simplecache"], "retry_for_s": 7.0},
        cache={"folder": str(tmp_path / "cache")},
    )
    data = saved_settings(run, []).data
    assert (data.validation.shards, data.storage.retry_for_s) == ("/a/b", 7.0)
    assert not data.storage.options and not data.storage.allow_schemes and not data.cache.folder
    given = ["data.storage.options.key=b", "data.storage.allow_schemes=[hdfs]", "data.cache.folder=/c"]
    data = saved_settings(run, given).data
    assert data.storage.options == {"key": "b"}
    assert (data.storage.allow_schemes, data.cache.folder) == (["hdfs"], "/c")


@pytest.mark.parametrize(
    "word",
    [
        "+data.storage.options={anon:'true'}",
        "data.storage={timeout_s:5}",
        "data.storage={timeout_s:5,options:{anon:'true'}}",
        "data={storage:{timeout_s:5}}",
        "data={num_workers:0}",
    ],
)
def test_a_setting_above_one_repeats_nothing_of_it(tmp_path: Path, word: str) -> None:
    storage = {"options": {"endpoint_url": "http://evil", "client_kwargs": "x"}, "allow_schemes": ["hdfs"]}
    run = saved(tmp_path, validation={"shards": EVIL}, storage=storage, cache={"folder": "/planted"})
    data = saved_settings(run, ["data.validation.shards=s3://bucket/set", word]).data
    assert data.validation.shards == "s3://bucket/set" and data.cache.folder == ""
    assert data.storage.options == ({"anon": "true"} if "anon" in word else {}) and not data.storage.allow_schemes
    for asks in ([word], [word, "+data.validation={weight:2}"], ["data={validation:{weight:2}}"]):
        with pytest.raises(ValueError, match=f"repeat the setting: data.validation.shards={EVIL} "):
            saved_settings(run, asks)


def test_submit_refuses_before_a_job_waits(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", validation={"shards": EVIL})
    with pytest.raises(ValueError, match="repeat the setting"):
        run_dir_of(["evaluate", str(run)])
    assert run_dir_of(["evaluate", str(run), f"data.validation.shards={EVIL}"]) == run
    assert run_dir_of(["evaluate", str(tmp_path / "later")]) == tmp_path / "later"


def test_the_file_that_chooses_samples_is_named_beside_their_shards(tmp_path: Path) -> None:
    also = {"more": {"shards": "/b", "keys": "/etc/passwd"}}
    data = saved_settings(saved(tmp_path, validation={"shards": "/a", "keys": "/etc/shadow", "also": also}), []).data
    sets, name = {"data.validation.shards": "/a", "data.validation.also.more.shards": "/b"}, "data.validation"
    files = {f"{name}.keys": "/etc/shadow", f"{name}.also.more.keys": "/etc/passwd"}
    assert locations(data, ["validation"]) == sets
    assert locations(data, ["validation"], with_keys=True) == sets | files


def test_the_command_says_what_it_will_not_follow_and_asks_nobody(tmp_path: Path) -> None:
    server = Server(tmp_path)
    location = f"http://{server.place}/val"
    run = saved(tmp_path / "run", validation={"shards": location}, cache={"folder": str(tmp_path / "planted")})
    done = subprocess.run(
        [sys.executable, "-m", "iccld", "evaluate", str(run)], capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"repeat the setting: data.validation.shards={location}" in done.stderr
    assert not server.heard and not (tmp_path / "planted").exists()


REFUSED = (
    "simplecache filecache blockcache zip tar ftp sftp ssh hdfs memory data reference github git dask smb dir cached "
    "libarchive jupyter webhdfs dbfs hf local generic asynclocal lakefs oss wandb"
)


@pytest.mark.parametrize("scheme", REFUSED.split())
def test_schemes_beyond_a_few_are_refused_unless_allowed(scheme: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{scheme}://host/a: {scheme}:// is not among .*data.storage.allow_schemes="
    ):
        open_storage(f"{scheme}://host/a", StorageConfig(options={"target_protocol": "file"}))
    assert scheme not in SCHEMES


@pytest.mark.parametrize(
    "location",
    ["simplecache::http://host/a", "zip://a::http://host/b.zip", "filecache::memory://a", "blockcache::s3://b/c"],
)
def test_chains_are_refused_even_if_allowed(location: str) -> None:
    allowed = StorageConfig(allow_schemes=["simplecache", "filecache", "blockcache", "memory", "zip"])
    with pytest.raises(ValueError, match="chains several file systems"):
        open_storage(location, allowed)


def test_what_is_not_allowed_is_refused_before_a_connection(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(1.0)
        came = []
        thread = threading.Thread(target=lambda: came.append(_accepted(listener)))
        thread.start()
        with pytest.raises(ValueError, match="ftp:// is not among"):
            open_storage(f"ftp://127.0.0.1:{listener.getsockname()[1]}/a").size("x.tar")
        thread.join()
    assert came == [False]


def _accepted(listener: socket.socket) -> bool:
    try:
        listener.accept()
    except TimeoutError:
        return False
    return True


def test_another_set_has_not_the_name_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    run = saved(tmp_path, validation={"shards": "/a", "name": "a"})
    for words, name in (
        ([], "a"),
        (["data.validation.shards=/a"], "a"),
        (["data.validation.shards=/b"], ""),
        (["data.validation.shards=/b", "data.validation.name=b"], "b"),
    ):
        assert saved_settings(run, words).data.validation.name == name
