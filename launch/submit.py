"""Train or evaluate as a SLURM job: `python launch/submit.py --nodes 2 train experiment=... run_dir=...`.

The same as `iccld submit`, for a checkout that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from iccld.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
