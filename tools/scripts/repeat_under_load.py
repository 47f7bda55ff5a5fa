"""Runs one test many times beside busy processes, to find what fails once in a hundred.

    python tools/scripts/repeat_under_load.py tests/faults/test_watchdog.py --times 20

The test's session fixtures are made once. A failure's output, with the stacks that crashed or hanging ranks leave, is
shown as always, and the exit status is not 0. Other options are pytest's.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Repeat:
    """A plugin that runs every test so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [again(item) for _ in range(self.times) for item in items if isinstance(item, pytest.Function)]


def again(item: pytest.Function) -> pytest.Function:
    """The same test once more; an item itself runs only once."""
    assert item.parent
    return pytest.Function.from_parent(
        item.parent,
        name=item.name,
        callspec=getattr(item, "callspec", None),
        callobj=item.obj,
        fixtureinfo=item._fixtureinfo,
        originalname=item.originalname,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", help="pytest's name of it")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="processes that compute (%(default)s)")
    arguments, options = parser.parse_known_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        plain = ["-n", "0", "-q", "-p", "no:cacheprovider", "--durations=0", *options]
        return int(pytest.main([arguments.test, *plain], plugins=[Repeat(arguments.times)]))
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
