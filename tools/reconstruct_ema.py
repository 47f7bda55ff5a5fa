"""Deprecated: use `python tools/scripts/reconstruct_ema.py`. Kept for scripts that call this path."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "scripts" / "reconstruct_ema.py"), run_name="__main__")
