"""Rank as in `iccld.programs.rank`, with $FAULT (tests/faults/worker.py) done to it in the first attempt."""

import os
import sys

from iccld.programs.rank import main
from iccld.runtime.faults.ending import run_to_the_end
from tests.faults.worker import inject

if __name__ in ("__main__", "__mp_main__") and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    inject()  # a rank, or a loader worker of it
if __name__ == "__main__":
    run_to_the_end(lambda: main(sys.argv[1:]))
