from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import services
from tests.data.factory import make_set


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of 13 labelled source pairs and 11 target images."""
    root = tmp_path_factory.mktemp("sets")
    return {
        "source": make_set(root / "source", 13).location,
        "target": make_set(root / "target", 11, labels=False).location,
    }


class Site(NamedTuple):
    """A web server: what is put in `folder` is at `url`."""

    folder: Path
    url: str


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """nginx on a folder that is empty at first; see `services.nginx` for its other paths."""
    try:
        services.install_nginx()
    except services.Unavailable as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("nginx")
    (home / "files").mkdir()
    with services.nginx(home / "files", home / "own") as url:
        yield Site(home / "files", url)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3-compatible server; `services.upload` makes a bucket of a folder."""
    with services.s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def faulty_server() -> Iterator[Callable[..., services.FaultyServer]]:
    """Starts a `FaultyServer(folder, ...)`; it ends with the test."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(services.faulty_server(*args, **settings))
