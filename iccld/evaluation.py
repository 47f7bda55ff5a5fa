"""Segmentation scores of a predict function: whole-image or sliding-window, exact over any split of the images.

Everything is counted in integers and the scores are computed once, from the summed counts, so several ranks with uneven
shares give the result of one rank to the last count.

Shape letters: `B C H W` image, `K` classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from iccld.eager import without_compiled_code
from iccld.labels import IGNORE_INDEX, ClassSet
from iccld.scores import EvaluationResult, Scores
from iccld.settings import EvaluationConfig
from iccld.strides import LATENT_STRIDE

Predict = Callable[[Tensor, Tensor], Tensor]
"""Images `(B, 3, H, W)` float32 in [0, 1] and sample numbers `(B,)` int64, which key the noise, to logits
`(B, K, h, w)`; logits of another size than the images' are resized to it."""


def whole_image(predict: Predict, images: Tensor, numbers: Tensor) -> Tensor:
    """Return logits `(B, K, H, W)` float32 in one pass; images `(B, 3, H, W)` are padded by their last rows."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % LATENT_STRIDE, 0, -height % LATENT_STRIDE), mode="replicate")
    return _resized(predict(padded, numbers).float(), padded.shape[-2:])[..., :height, :width]


def sliding_window(
    predict: Predict, images: Tensor, numbers: Tensor, *, window: list[int], stride: list[int], batch_size: int = 1
) -> Tensor:
    """Return logits `(B, K, H, W)` float32, the mean over overlapping windows of images `(B, 3, H, W)`.

    A pass takes `batch_size` windows. A side shorter than the window is taken whole, and the last window ends at the
    border. All windows of an image carry its number.
    """
    sides = [min(side, length) for side, length in zip(window, images.shape[-2:], strict=True)]
    tops, lefts = (_starts(*args) for args in zip(images.shape[-2:], sides, stride, strict=True))
    places = [(b, y, x) for b in range(len(images)) for y in tops for x in lefts]
    total, count = None, images.new_zeros(images.shape[-2:])
    for first in range(0, len(places), batch_size):
        chunk = places[first : first + batch_size]
        crops = torch.stack([images[b, :, y : y + sides[0], x : x + sides[1]] for b, y, x in chunk])
        logits = whole_image(predict, crops, numbers[[b for b, _, _ in chunk]])
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
        for (b, y, x), part in zip(chunk, logits, strict=True):
            total[b, :, y : y + sides[0], x : x + sides[1]] += part
    for y in tops:
        for x in lefts:
            count[y : y + sides[0], x : x + sides[1]] += 1
    assert total is not None, "an image has at least one window"
    return total.div_(count)


def windowed(predict: Predict, config: EvaluationConfig) -> Predict:
    """Let `predict` take images of any size, as the configuration says: resized, whole-image or sliding-window."""
    any_size = partial(whole_image, predict)
    if config.sliding_window:
        options = {"window": config.window, "stride": config.stride, "batch_size": config.batch_size}
        any_size = partial(sliding_window, predict, **options)
    return partial(_at_size, any_size, config.image_size) if config.image_size else any_size


def _at_size(predict: Predict, size: list[int], images: Tensor, numbers: Tensor) -> Tensor:
    """Return logits of the images' size from a pass at another size."""
    resized = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)
    return _resized(predict(resized, numbers), images.shape[-2:])


@torch.no_grad()
@without_compiled_code()  # images come in many sizes; compiled code is for the training's size
def evaluate(
    samples: Iterable[Mapping[str, Any]],
    predict: Predict,
    *,
    class_set: ClassSet,
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> EvaluationResult:
    """Score `predict` at the labels' resolution. `all_reduce` sums a tensor over the ranks, each with its own samples.

    A sample is `{"image": (H, W, 3) uint8, "labels": (H', W') uint8 class indices, "key": str, "number": int}`; the
    numbers ascend within a rank.
    """
    class_set.subset(config.num_classes or class_set.num_classes)  # refuse before the work
    scores = Scores(class_set.num_classes, boundary_width=config.boundary_width, device=device)
    if config.max_images:
        samples = takewhile(lambda sample: sample["number"] < config.max_images, samples)
    any_size = windowed(predict, config)
    for batch in _batches(samples, 1 if config.sliding_window else config.batch_size):
        images = torch.from_numpy(np.stack([sample["image"] for sample in batch])).to(device)
        numbers = torch.tensor([sample["number"] for sample in batch], device=device)
        logits = any_size(images.permute(0, 3, 1, 2).float() / 255, numbers)
        for sample, part in zip(batch, logits, strict=True):
            labels = _checked_labels(sample, class_set, num_channels=len(part))
            predicted = _resized(part[None], labels.shape)[0].max(0).indices  # equals argmax, which is slow on a CPU
            scores.add(predicted, torch.from_numpy(labels).to(device))
    scores.counts = all_reduce(scores.counts)
    return scores.result(class_set, config.num_classes)


def results_table(results: Mapping[str, EvaluationResult], *, title: str = "") -> Table:
    """Make a table for the terminal: a column a result, the means first, then a row a class.

    All results have the same classes.
    """
    names = next(iter(results.values())).names
    assert all(result.names == names for result in results.values()), "results over different classes"
    table = Table(title=title or None)
    table.add_column("%")
    for name in results:
        table.add_column(escape(name), justify="right")
    rows = [
        (f"mIoU-{len(names)}", [result.miou for result in results.values()]),
        (f"boundary mIoU-{len(names)}", [result.boundary_miou for result in results.values()]),
        ("pixel accuracy", [result.pixel_accuracy for result in results.values()]),
        ("mean accuracy", [result.mean_accuracy for result in results.values()]),
    ]
    rows += [(escape(name), [result.iou[i] for result in results.values()]) for i, name in enumerate(names)]
    for i, (label, values) in enumerate(rows):
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        table.add_row(label, *cells, style="bold" if i == 0 else None, end_section=i == 3)
    return table


def _starts(length: int, side: int, step: int) -> list[int]:
    """Return the first rows (or columns) of the windows; the last window ends at the border."""
    return [*range(0, length - side, step), length - side]


def _resized(logits: Tensor, size: Iterable[int]) -> Tensor:
    """Resize logits `(B, K, H, W)` to `size`."""
    height, width = size
    if tuple(logits.shape[-2:]) == (height, width):
        return logits
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _batches(samples: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    """Yield consecutive samples of one image size, at most `size` of them."""
    batch: list[Mapping[str, Any]] = []
    for sample in samples:
        if len(batch) == size or (batch and sample["image"].shape != batch[0]["image"].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _checked_labels(sample: Mapping[str, Any], class_set: ClassSet, *, num_channels: int) -> np.ndarray:
    """Return the sample's labels. Raises ValueError if they or the model do not fit the class set."""
    k = class_set.num_classes
    if num_channels != k:
        raise ValueError(
            f"evaluation: the model tells {num_channels} classes apart, the class set has {k}; "
            f"use the class set that the checkpoint was trained with."
        )
    labels = sample["labels"]
    bad = labels[(labels >= k) & (labels != IGNORE_INDEX)]
    if bad.size:
        raise ValueError(
            f"evaluation: the labels of {sample['key']!r} hold {np.unique(bad).tolist()}, but class indices are "
            f"0-{k - 1} and {IGNORE_INDEX}; make the shards with the class set of this model."
        )
    return labels
