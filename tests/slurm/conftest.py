"""One cluster for all tests of a process, each test with a run directory and jobs of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.install import Unavailable, install_slurm

ROOT = Path(__file__).parents[2]


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
