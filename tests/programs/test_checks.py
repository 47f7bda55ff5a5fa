"""What one rank finds in a check ends all, with one status."""

import errno
from typing import Any

import pytest

from iccld.outcome import AGAIN, REFUSED, status_of
from iccld.programs.run.checks import together


class Ranks:
    """This rank, and what another one found."""

    def __init__(self, *, is_main: bool, other: Exception | None) -> None:
        self.is_main, self.other = is_main, other

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.other]


def ending(error: Exception | None, **options: Any) -> BaseException:
    def check() -> None:
        if error:
            raise error

    engine: Any = Ranks(**options)
    with pytest.raises((ValueError, OSError, SystemExit)) as raised:
        together(check, engine)
    return raised.value


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a setting"), REFUSED),
        (FileNotFoundError(errno.ENOENT, "no such file", "x"), REFUSED),
        (OSError(errno.EIO, "input/output error", "x"), AGAIN),
        (ConnectionError("gone"), AGAIN),
    ],
)
def test_all_ranks_end_with_the_status_of_what_one_found(error: Exception, status: int):
    found = ending(error, is_main=True, other=None)
    assert status_of(found) == status and str(error) in str(found)
    assert status_of(ending(None, is_main=True, other=found)) == status
    for own in (error, None):
        silent = ending(own, is_main=False, other=found)
        assert isinstance(silent, SystemExit) and silent.code == status


def test_nothing_found_is_nothing():
    engine: Any = Ranks(is_main=False, other=None)
    together(lambda: None, engine)
