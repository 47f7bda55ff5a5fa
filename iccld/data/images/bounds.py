"""Limits of the size of an image file, and the one kind of error that a bad file may cause."""

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import UnidentifiedImageError

MAX_PIXELS = 2**26
"""The most pixels of an image: 8192 x 8192. PIL warns from 89 million on."""


def check_size(height: int, width: int) -> None:
    """Raise ValueError if an image is empty or too large."""
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"it has {height}x{width} pixels; an image may have 1 to {MAX_PIXELS}")


@contextmanager
def as_value_errors(library: str) -> Iterator[None]:
    """Turn everything that a library raises on a damaged file into ValueError, failed assertions too.

    MemoryError stays: within the limits, a lack of memory is the machine's fault and not the file's.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message names a buffer
        raise ValueError("its header is damaged") from None
    except Exception as error:
        raise ValueError(f"{library} cannot read it ({type(error).__name__}: {error})") from error
