"""The header of a JPEG and the number of its scans, read from its bytes.

Bytes after the end of the image are ignored: cameras put films, thumbnails and padding there.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from iccld.data.images.orientation import UPRIGHT, read_orientation

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0-15
_USUAL_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers that nothing belongs to
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_ADOBE = 0xEE  # how colours are stored
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_IN_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_MAX_SEGMENTS = 2**16
_DAMAGED = "it is a JPEG whose header is cut off or damaged"


class JpegHeader(NamedTuple):
    """Size in pixels as stored, bits a sample, (horizontal, vertical) samplings, and EXIF orientation.

    `scan` is the offset of the first scan; `segments` are the ranges before it that pixels depend on. `usual` tells
    whether pixels are stored as in nearly all JPEGs: neither lossless nor in layers of sizes.
    """

    height: int
    width: int
    depth: int
    samplings: tuple[tuple[int, int], ...]
    usual: bool
    orientation: int
    scan: int
    segments: tuple[tuple[int, int], ...]


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Read the header, up to the first scan. Raises ValueError if it is cut short or damaged."""
    frame, orientation, kept, start = None, UPRIGHT, [], 0
    for marker, start, end in _segments(data):
        content = slice(start + 4, end)
        if marker in _FRAMES and frame is None:
            frame = *_read_frame(data[content]), marker in _USUAL_FRAMES
        if not 0xE1 <= marker <= 0xEF or marker == _ADOBE:
            kept.append((start, end))
        if marker == _EXIF and orientation == UPRIGHT and data[start + 4 : start + 8] == b"Exif":
            orientation = read_orientation(data[content])
    if frame is None:
        raise ValueError(_DAMAGED)
    kept.pop()  # the scan's own
    return JpegHeader(*frame, orientation, start, tuple(kept))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment up to that of the first scan, which is the last."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END:
            break
        marker, at = found[1][0], found.end()
        if marker not in _ALONE:
            at = _end_of_segment(data, at)
            yield marker, found.start(), at
        if marker == _SCAN:
            return
    raise ValueError(_DAMAGED)


def only_pixels(data: bytes, header: JpegHeader) -> bytes:
    """Return the picture without the parts that its pixels do not depend on.

    These are EXIF, lists of further pictures and the like, which may be broken; padding between the parts of the
    header; and the bytes after the end marker.
    """
    end = _walk_scans(data, header)[1]
    return b"".join([data[:2], *(data[start:stop] for start, stop in header.segments), data[header.scan : end + 2]])


def without_padding(data: bytes, complaint: str) -> bytes:
    """Remove the zeros before the end marker that libjpeg complains of; anything else there stays.

    No byte that libjpeg has read as pixels is removed.
    """
    found = re.search(r"(\d+) extraneous bytes before marker 0xd9", complaint)
    pixels = data[: -2 - int(found[1])] if found else data
    return pixels + data[-2:] if found and not any(data[len(pixels) : -2]) else data


def count_scans(data: bytes, header: JpegHeader, *, at_most: int) -> int:
    """Count the scans of a picture, without those of pictures and films that follow it.

    A scan costs time for all pixels, and next to no bytes. Counting all markers is fast, and is enough for most files.
    """
    codes = np.frombuffer(data, np.uint8)
    marks = int(np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == _SCAN)))
    if marks <= at_most:
        return marks
    return _walk_scans(data, header)[0]


def _walk_scans(data: bytes, header: JpegHeader) -> tuple[int, int]:
    """Return the number of scans, and the offset of the end marker, or of the file's end if it has none."""
    num_scans, at = 0, header.scan
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER_IN_SCAN.search(data, at)
        if found is None or found[1][0] == _END:
            return num_scans, found.start() if found else len(data)
        num_scans += found[1][0] == _SCAN
        at = found.end() if found[1][0] in _ALONE else _end_of_segment(data, found.end())
    raise ValueError(_DAMAGED)


def _end_of_segment(data: bytes, at: int) -> int:
    """Return the end of the segment whose length is written at `at`."""
    length = int.from_bytes(data[at : at + 2])
    if length < 2 or at + length > len(data):
        raise ValueError(_DAMAGED)
    return at + length


def _read_frame(segment: bytes) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    """Return height, width, depth and samplings."""
    try:
        depth, height, width, count = struct.unpack_from(">BHHB", segment)
        samplings = tuple((code >> 4, code & 15) for _, code, _ in struct.iter_unpack("3B", segment[6 : 6 + 3 * count]))
    except struct.error:
        raise ValueError(_DAMAGED) from None
    if not samplings or len(samplings) != count:
        raise ValueError(_DAMAGED)
    return height, width, depth, samplings
