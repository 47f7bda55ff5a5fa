"""The limit of open files is compared with what a run needs, and what would do is said."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from iccld.runtime.faults.open_files import check_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, int(sys.argv[1])))
try:
    check_open_files(num_workers=4, world_size=1024)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "said"), [(4096, "1024 ranks need 4156; raise it (ulimit -n 4156,"), (4156, "")])
def test_many_ranks_are_told_the_limit_that_would_do(limit: int, said: str) -> None:
    """Each rank is connected with all others, on whichever machine."""
    command = [sys.executable, "-c", PROGRAM, str(limit)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said in out and bool(out) == bool(said)
