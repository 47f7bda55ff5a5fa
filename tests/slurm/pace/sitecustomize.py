"""Put on PYTHONPATH, slows a run down: each line of metrics.jsonl waits as long as the file $ICCLD_TEST_PACE says.

With a line a step, a test can let a run stand at a step, do something to it, and let it go on.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any


def _wait(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and arguments[2] & os.O_APPEND:
        time.sleep(float(Path(os.environ["ICCLD_TEST_PACE"]).read_text()))


if "ICCLD_TEST_PACE" in os.environ:
    sys.addaudithook(_wait)
