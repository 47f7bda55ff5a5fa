"""One cluster for all tests of a process, and one undisturbed run that all are compared with."""

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.install import Unavailable, install_slurm
from tests.slurm.jobs import settings, train_here


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes, idle."""
    try:
        install_slurm()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with Cluster() as running:
        running.environment |= {"ICCLD_SILENCE_S": "12", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        yield running


@pytest.fixture(scope="session")
def undisturbed(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks by the local launcher; made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "undisturbed"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "report").is_dir():
            train_here(settings(scene_shards, folder))
    return folder
