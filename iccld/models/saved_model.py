"""Checks of a saved model, which a stranger may have made: its card's description and its file of weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from iccld.models.encoder import EncoderConfig

MAX_HEADER = 16 << 20
"""The most bytes of a header; a model of a thousand tensors has a hundredth of it."""


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
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
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
