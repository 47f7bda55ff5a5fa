"""Bytes to arrays: simplejpeg for JPEG, PIL for the rest, behind webdataset's decoder."""

import io
import struct
from collections.abc import Mapping

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

LABEL_EXTENSION = "label.png"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL and simplejpeg raise on bytes that are broken, hostile, or no image."""

_LABEL_MODES = ("L", "P", "I;16", "I")
_IMAGE_MODES = ("RGB", "RGBA", "L", "P", "CMYK")


def decode_image(data: bytes) -> np.ndarray:
    """An encoded image to `(H, W, 3)` uint8 RGB. The format is read from the bytes, not from a file's name."""
    if simplejpeg.is_jpeg(data):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    with _open(data) as image:
        if image.mode not in _IMAGE_MODES:
            raise ValueError(f"its pixels are of mode {image.mode}; images must have 8 bits a channel")
        return np.array(image.convert("RGB"))


def decode_label(data: bytes) -> np.ndarray:
    """An encoded label image to `(H, W)` integers: grey values, or the indices of a palettised image."""
    with _open(data) as image:
        if image.mode not in _LABEL_MODES:
            raise ValueError(f"it has several channels (mode {image.mode}); labels must have one id a pixel")
        return np.array(image)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, read from its header."""
    with _open(data) as image:
        return image.height, image.width


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its message names a buffer
        raise ValueError("it is no image of a known format") from None


def _label_handler(extension: str, data: bytes) -> np.ndarray | None:
    return decode_label(data) if extension == f".{LABEL_EXTENSION}" else None


def _image_handler(extension: str, data: bytes) -> np.ndarray | None:
    return decode_image(data) if extension[1:] in IMAGE_EXTENSIONS else None


def decode_sample(raw: Mapping[str, str | bytes]) -> dict[str, str | np.ndarray]:
    """A raw webdataset sample (`__key__`, `__url__`, `jpg`, `label.png`, ...) with its fields decoded."""
    from webdataset.autodecode import Decoder, DecodingError  # imports torch, for which `--help` should not wait

    # Without `pre` and `post`, webdataset would add its defaults, and among them pickle.
    decoder = Decoder([_label_handler, _image_handler], pre=[], post=[])
    try:
        return decoder(dict(raw))
    except DecodingError as error:
        raise ValueError(
            f"{raw['__url__']}: sample {raw['__key__']!r} cannot be decoded: {error.__cause__}; make the shard again."
        ) from error.__cause__
