"""Images that a user gives, as paths, PIL images, arrays or tensors; their range and layout are checked."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from iccld.inference.files import image_number, read_image

Images = str | Path | Image.Image | np.ndarray | Tensor
"""One image: a path, a PIL image, an array (H, W, 3), a tensor (3, H, W); or a batch of them, a tensor (B, 3, H, W)."""
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class Numbered(NamedTuple):
    """Pixels `(H, W, 3)`, uint8 or float32 in [0, 1], and the number that keys the image's noise.

    A file's number comes from its name, any other image's from its pixels: so an image is segmented alike alone and
    among others.
    """

    pixels: np.ndarray
    number: int


def is_one(images: Images | Sequence[Images]) -> bool:
    """Tell whether a single image is given, for a single result. A batch of one is a batch."""
    is_batch = isinstance(images, Tensor) and images.ndim == 4
    return isinstance(images, str | bytes) or not (is_batch or isinstance(images, Sequence))


def read_images(images: Images | Sequence[Images]) -> Iterator[Numbered]:
    """Read one image after the other, when it is asked for. Raises ValueError, in one line, for any other input."""
    several: Iterable[Any] = [images] if is_one(images) else images  # pyright: ignore[reportAssignmentType]
    for image in several:
        yield _read(image)


def _read(image: Any) -> Numbered:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        return Numbered(read_image(path), image_number(path))
    if isinstance(image, Image.Image):
        pixels = _of_pil(image)
    elif isinstance(image, np.ndarray):
        pixels = _of_array(image)
    elif isinstance(image, Tensor):
        pixels = _of_tensor(image)
    else:
        raise ValueError(
            f"predict: {type(image).__name__} is no image; give paths, PIL images, arrays (H, W, 3) or tensors "
            f"(3, H, W), one or a list."
        )
    picture = pixels if pixels.dtype == np.uint8 else np.round(pixels * 255).astype(np.uint8)
    return Numbered(pixels, zlib.crc32(np.ascontiguousarray(picture).data))


def _of_pil(image: Image.Image) -> np.ndarray:
    if image.mode not in _EIGHT_BITS:
        raise ValueError(
            f"predict: a PIL image of mode {image.mode} has no known range; give its path, or convert it to RGB."
        )
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _of_array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        remedy = {
            image.ndim == 2: "repeat grey values with np.stack([image] * 3, axis=-1)",
            image.ndim == 3 and image.shape[0] == 3: "channels come last: image.transpose(1, 2, 0)",
            image.ndim == 3 and image.shape[2] == 4: "drop alpha with image[..., :3]",
            image.ndim == 4: "give several arrays as a list: list(images)",
        }.get(True, "give RGB pixels")
        raise ValueError(f"predict: an array of shape {image.shape} must be (H, W, 3); {remedy}.")
    if image.dtype == np.uint8:
        return np.array(image, order="C")  # its own: the caller may use the buffer again; no mirrored view, for torch
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"predict: an array of {image.dtype} must be uint8, or float in [0, 1]; convert it.")
    _check_range(float(image.min()), float(image.max()))  # NaN is in neither
    return np.clip(image, 0, 1).astype(np.float32)


def _of_tensor(image: Tensor) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        is_last = image.ndim == 3 and image.shape[2] == 3
        remedy = "channels come first: image.permute(2, 0, 1)" if is_last else "give RGB pixels"
        raise ValueError(
            f"predict: a tensor of shape {tuple(image.shape)} must be (3, H, W) or (B, 3, H, W); {remedy}."
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"predict: a tensor of {image.dtype} must be uint8, or float in [0, 1]; convert it.")
    image = image.detach().cpu().permute(1, 2, 0)
    return _of_array((image if image.dtype == torch.uint8 else image.float()).numpy())


def _check_range(low: float, high: float) -> None:
    tolerance = 1e-3  # resizing and half precision overshoot
    if low >= -tolerance and high <= 1 + tolerance:
        return
    remedy = "divide by 255" if low >= 0 else "give the image before it is normalised; the model does it itself"
    raise ValueError(f"predict: float pixels from {low:.4g} to {high:.4g} must lie in [0, 1]; {remedy}.")
