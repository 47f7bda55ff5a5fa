"""Prediction of a model for one image. Shape letters: `H W` image, `K` classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iccld.durable import replacing
from iccld.evaluation import Predict
from iccld.inference.pictures import label_picture, overlay, save_picture


@dataclass(frozen=True, repr=False)
class Prediction:
    """Labels, probabilities and uncertainty of an image, with the names and colours of the model's classes."""

    image: np.ndarray
    """`(H, W, 3)` uint8 RGB, upright."""
    labels: np.ndarray
    """`(H, W)` uint8 class indices."""
    mean: Tensor
    """`(K, H, W)` float32 probabilities, the mean over the noise seeds; wherever they were computed."""
    mean_entropy: Tensor | None
    """`(H, W)` float32, in nats: the mean of each seed's entropy; None for one seed."""
    names: Sequence[str]
    """The name of each class."""
    colours: Sequence[tuple[int, int, int]]
    """The colour of each class, RGB."""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Prediction({height}x{width} pixels; classes: {', '.join(self.names)})"

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Return the mean probabilities over the noise seeds, `(K, H, W)` float32 in [0, 1]."""
        return self.mean.cpu().numpy()

    @cached_property
    def uncertainty(self) -> np.ndarray:
        """Return the entropy of `probabilities`, as a share of log K: `(H, W)` float32 in [0, 1].

        0: one class is certain. 1: all are equally likely. It grows where the seeds are unsure and where they differ.
        """
        return (_entropy(self.mean) / math.log(len(self.mean))).clamp(0, 1).cpu().numpy()

    @cached_property
    def disagreement(self) -> np.ndarray:
        """Return the part of `uncertainty` that comes from the noise, `(H, W)` float32 in [0, 1]; 0 for one seed.

        It is the mutual information of class and seed, as a share of log K: the entropy of the mean probabilities, less
        the mean of the seeds' entropies.
        """
        entropy = _entropy(self.mean)
        between = torch.zeros_like(entropy) if self.mean_entropy is None else entropy - self.mean_entropy
        return (between / math.log(len(self.mean))).clamp(0, 1).cpu().numpy()

    def overlay(self) -> Image.Image:
        """Return the image, half covered by the classes' colours."""
        return Image.fromarray(overlay(self.image, self.labels, self.colours))

    def save(self, path: str | Path) -> None:
        """Write a `.png` of the class indices, shown in the classes' colours, or an `.npz` of the probabilities.

        The `.npz` holds `probabilities` (K, H, W) float16, `uncertainty` (H, W) float16 and `names`. Raises ValueError
        for another ending, OSError where the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            save_picture(label_picture(self.labels, self.colours), path)
        elif path.suffix.lower() == ".npz":
            arrays = {"probabilities": self.probabilities, "uncertainty": self.uncertainty}
            halves = {name: array.astype(np.float16) for name, array in arrays.items()}
            with replacing(path, durably=False) as file:
                np.savez_compressed(file, names=np.array(self.names), **halves)  # pyright: ignore[reportArgumentType]
        else:
            raise ValueError(f"save: {path} must end in .png (labels) or .npz (probabilities).")

    def on_cpu(self) -> "Prediction":
        """Return the same prediction in the host's memory."""
        entropy = None if self.mean_entropy is None else self.mean_entropy.cpu()
        return replace(self, mean=self.mean.cpu(), mean_entropy=entropy)


@torch.no_grad()
def segment(
    image: np.ndarray,
    number: int,
    *,
    predictors: Sequence[Predict],
    names: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    device: torch.device | str = "cpu",
) -> Prediction:
    """Segment `(H, W, 3)`, uint8 or float32 in [0, 1]. Probabilities are the mean over `predictors`, one a noise seed.

    number: keys the noise.
    """
    images = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    numbers = torch.tensor([number], device=device)
    maps = (predict(images, numbers)[0].float() for predict in predictors)
    logits = next(maps)
    assert logits.shape[-2:] == images.shape[-2:], "predict must return logits of the image's size"
    labels, mean, entropy = logits.argmax(0), logits.softmax(0), None
    if len(predictors) > 1:
        entropy = _entropy(mean)
        for logits in maps:
            probabilities = logits.softmax(0)
            entropy += _entropy(probabilities)
            mean += probabilities
        mean /= len(predictors)
        entropy /= len(predictors)
        labels = mean.argmax(0)
    picture = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
    return Prediction(picture, labels.to(torch.uint8).cpu().numpy(), mean, entropy, names, colours)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of `(K, H, W)`: `(H, W)`."""
    return torch.special.entr(probabilities).sum(0)
