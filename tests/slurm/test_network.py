"""A link that is cut and brought back, on nodes with addresses and names of their own."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.install import Unavailable, has_network_namespaces, install_slurm
from tests.slurm.jobs import PacedRun, assert_same_run
from tests.slurm.namespaces import NamespaceCluster


@pytest.fixture(scope="module")
def network() -> Iterator[NamespaceCluster]:
    """Three nodes."""
    try:
        install_slurm()
    except Unavailable as reason:
        pytest.skip(str(reason))
    if not has_network_namespaces():
        pytest.skip("network namespaces cannot be made here (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
    with NamespaceCluster() as running:
        running.environment |= {"ICCLD_SILENCE_S": "12", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        yield running


def test_a_link_is_cut_and_the_job_ends_on_other_nodes(
    network: NamespaceCluster, scene_shards: Path, undisturbed: Path, tmp_path: Path
):
    run = PacedRun(network, scene_shards, tmp_path)
    run.words.append("watchdog.step_s=20")
    job = run.submit()
    run.wait_for_step(5)
    nodes = network.run("scontrol", "show", "hostnames", network.fact(job, "NodeList")).split()
    lost = next(node for node in nodes if node != network.fact(job, "BatchHost"))
    network.cut(lost)
    since = time.monotonic()
    wait_until(lambda: run.has_restarted, 150, "the next attempt", run.tail)  # 30 s to see it, then 2 minutes
    assert time.monotonic() - since < 150
    again = network.run("scontrol", "show", "hostnames", network.fact(job, "NodeList")).split()
    assert lost not in again and len(again) == 2
    network.mend(lost)
    run.finish()
    wait_until(lambda: network.states().count("idle") == 3, 60, "the node's return", network.tail)
    assert_same_run(undisturbed, run.run_dir)
