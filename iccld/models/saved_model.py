"""Writing of a saved model's weights, and checks of a model that a stranger may have saved: its card and weights."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iccld.durable import file_checksum, replacing_by_name
from iccld.models.model_card import CARD_NAME, ModelCard
from iccld.models.settings import EncoderConfig
from iccld.outcome import lacks_memory

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
MAX_HEADER = 16 << 20
"""The most bytes of a header; a model of a thousand tensors has a hundredth of it."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors, whole or not at all. Raises OSError, where the library has an error of its own."""
    try:
        with replacing_by_name(path) as scratch:
            save_file(dict(tensors), scratch, metadata=metadata)
    except SafetensorError as error:  # a full disk, for one
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def check_described(encoder: EncoderConfig, card: Path) -> None:
    """Refuse a card that names its encoder instead of describing it: a host would be asked. Raises ValueError."""
    if encoder.pretrained:
        raise ValueError(
            f"{card} names an encoder, {encoder.pretrained!r}, in place of describing it; export the model again."
        )


@contextlib.contextmanager
def described_by(card: Path) -> Iterator[None]:
    """Turn every error of building a model from a card, whose settings may be anything, into ValueError."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except ValueError as error:
        if str(card) in str(error):
            raise
        raise ValueError(f"{card}: {error}") from error
    except Exception as error:
        if lacks_memory(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{card} describes no model that can be built ({what}); export the model again.") from error


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a file of weights, from its header. Raises ValueError."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"{path} says that its header has {header} bytes; that is no file of weights.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or export the model again.") from error


def without_denoiser(named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what belongs to the weights of E, D and M, by their names."""
    return {name: value for name, value in named.items() if not name.startswith("denoiser.")}


def check_weights(path: Path, card: ModelCard, weights: Mapping[str, Tensor], *, with_denoiser: bool) -> None:
    """Raise ValueError unless a file holds these weights, by names, shapes and the card's checksum.

    weights: of the model that the card describes; their values do not count. with_denoiser: False if the file's is left
    out.
    """
    shapes = shapes_in(path) if with_denoiser else without_denoiser(shapes_in(path))
    own = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = [name for name in sorted(own.keys() | shapes.keys()) if shapes.get(name) != own.get(name)]
    if wrong:
        version = card.model.get("encoder", {}).get("backbone_config", {}).get("transformers_version", "unknown")
        raise ValueError(
            f"{path} does not fit its {CARD_NAME}: {len(wrong)} weights are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}). Export the model again, or use the transformers of its backbone, {version}."
        )
    if not card.weights_sha256:
        logger.warning("%s: written by an earlier iccld, without a checksum of its weights", path)
    elif file_checksum(path) != card.weights_sha256:
        raise ValueError(
            f"{path} is not what its {CARD_NAME} was written for (its checksum differs); copy both files again."
        )
