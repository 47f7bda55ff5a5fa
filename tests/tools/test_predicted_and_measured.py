"""The plan beside real ranks: what two take, predicted from one and measured."""

import contextlib
import json
import shutil
import subprocess

import pytest
import scaling_pairs


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "discipline", ["", "tbf rate 400mbit burst 64kbit latency 50ms"], ids=["loopback", "slow link"]
)
def test_two_ranks_take_what_was_predicted_from_one(discipline: str) -> None:
    """The prediction holds within 10 %. The test is timed, and may fail on a machine that does other things."""
    if discipline and not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces and slow links are made by iproute2, which is not here")
    try:
        with scaling_pairs.two_namespaces(discipline) if discipline else contextlib.nullcontext([]) as names:
            found = scaling_pairs.compare("ddp", (2_000_000, 2, 96), rounds=20, namespaces=names)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no slow link between network namespaces here: {error.cmd}: {error.stderr.strip()}")
    assert found["one"]["predicted_s"] == pytest.approx(found["one"]["measured_s"])
    assert found["over_measured"] == pytest.approx(1, abs=0.1), json.dumps(found)
