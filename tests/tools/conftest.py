"""The scripts of tools/ import one another by name, as when they are run."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "benchmarks"), str(TOOLS / "scripts")]
