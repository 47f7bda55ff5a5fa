"""The EXIF tag that says how a camera was held: reading it, and turning the pixels upright.

No other tag is read, so no other can do harm. A tag that is damaged or not one of the eight counts as upright.
"""

import struct

import numpy as np

UPRIGHT = 1
_TAG = 0x0112
_FORMATS = {1: "B", 3: "H", 4: "I"}  # EXIF's numbers of unsigned integers; the standard says H


def read_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, of a block of EXIF, with or without `Exif` and two bytes before it."""
    tiff = exif[6:] if exif[:4] == b"Exif" else exif
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == _TAG and kind in _FORMATS and count == 1:
                (value,) = struct.unpack_from(order + _FORMATS[kind], tiff, at + 8)
                return value if 1 <= value <= 8 else UPRIGHT
    except struct.error:  # the block ends before its directory does
        pass
    return UPRIGHT


def is_turned(orientation: int) -> bool:
    """Tell whether height and width change places."""
    return orientation >= 5


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels `(H, W, ...)` upright; the result is a copy unless they already are."""
    if orientation == UPRIGHT:
        return pixels
    if is_turned(orientation):
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::down, ::right])
