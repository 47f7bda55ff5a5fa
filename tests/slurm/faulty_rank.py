"""In place of `iccld.programs.rank`: the same, with $FAULT (tests/faults/worker.py) done to it in the first attempt."""

import os
import sys

from iccld.programs.rank import main
from tests.faults.worker import inject

if __name__ == "__main__":
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        inject()
    sys.exit(main(sys.argv[1:]))
