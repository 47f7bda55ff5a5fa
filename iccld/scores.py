"""Segmentation scores from integer counts: IoU, boundary IoU and accuracy, exact over any split of the images.

Shape letters: `H W` image, `K` classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iccld.labels import IGNORE_INDEX, ClassSet


@dataclass(frozen=True)
class EvaluationResult:
    """Scores in per cent. NaN (null in JSON) marks a class, or a mean, for which there is nothing to count.

    A class that occurs neither in the truth nor in the predictions is left out of the means; one that is predicted but
    does not occur scores IoU 0, as in mmsegmentation. A mean over 16 or 13 classes is the mean of those classes' IoUs,
    each against all predictions and all labels.
    """

    names: list[str]
    iou: list[float]
    boundary_iou: list[float]
    miou: float
    boundary_miou: float
    pixel_accuracy: float
    mean_accuracy: float
    num_images: int

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and null, ready for `json.dump`."""
        return {name: _null(value) for name, value in asdict(self).items()}


def mean_result(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """Average the scores of several predictions of the same images; what has no value in any of them stays NaN."""
    by_class = ("iou", "boundary_iou")
    columns = {name: zip(*(getattr(result, name) for result in results), strict=True) for name in by_class}
    means: dict[str, Any] = {name: [_mean(np.array(values)) for values in column] for name, column in columns.items()}
    for name in ("miou", "boundary_miou", "pixel_accuracy", "mean_accuracy"):
        means[name] = _mean(np.array([getattr(result, name) for result in results]))
    return replace(results[0], **means)


class Scores:
    """Integer counts over images; two sets of images add up by adding `counts`.

    `counts` is `(K * K + 3 * K + 1,)` int64: the confusion matrix (rows: truth, columns: prediction), the boundary
    bands' pixels per class (in both, in the prediction, in the truth), and the number of images.
    """

    def __init__(self, num_classes: int, *, boundary_width: int = 2, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.boundary_width = boundary_width
        self.counts = torch.zeros(num_classes * num_classes + 3 * num_classes + 1, dtype=torch.int64, device=device)

    @property
    def confusion(self) -> Tensor:
        """Return pixels of truth class (row) that were given the class of the column, `(K, K)` int64."""
        return self.counts[: self.num_classes**2].view(self.num_classes, self.num_classes)

    @property
    def boundary(self) -> Tensor:
        """Return pixels of the bands' intersection, of the prediction's band, of the truth's band, `(3, K)` int64."""
        return self.counts[self.num_classes**2 : -1].view(3, self.num_classes)

    def add(self, prediction: Tensor, labels: Tensor) -> None:
        """Count one image: class indices `(H, W)` each; pixels whose label is 255 do not count."""
        k = self.num_classes
        valid = labels != IGNORE_INDEX
        truth, prediction = labels.long(), prediction.long()
        self.confusion.add_(torch.bincount((truth * k + prediction)[valid], minlength=k * k).view(k, k))
        in_prediction = boundary_band(prediction, valid, width=self.boundary_width)
        in_truth = boundary_band(truth, valid, width=self.boundary_width)
        both = in_prediction & in_truth & (prediction == truth)
        for row, (of, band) in zip(
            self.boundary, ((truth, both), (prediction, in_prediction), (truth, in_truth)), strict=True
        ):
            row.add_(torch.bincount(of[band], minlength=k))
        self.counts[-1] += 1

    def result(self, class_set: ClassSet, num_classes: int = 0) -> EvaluationResult:
        """Compute the scores over the classes of mIoU-`num_classes` (0: all of the class set's)."""
        num_images = int(self.counts[-1])
        if num_images == 0:
            raise ValueError("evaluation: no image was scored; check the validation set and evaluation.max_images.")
        classes = list(class_set.subset(num_classes or self.num_classes))
        confusion, (both, predicted, true) = self.confusion.cpu().numpy(), self.boundary.cpu().numpy()
        hits, of_truth = confusion.diagonal(), confusion.sum(1)
        iou = _percent(hits, of_truth + confusion.sum(0) - hits)[classes]
        boundary_iou = _percent(both, predicted + true - both)[classes]
        return EvaluationResult(
            names=[class_set.names[c] for c in classes],
            iou=iou.tolist(),
            boundary_iou=boundary_iou.tolist(),
            miou=_mean(iou),
            boundary_miou=_mean(boundary_iou),
            pixel_accuracy=float(_percent(hits[classes].sum(), of_truth[classes].sum())),
            mean_accuracy=_mean(_percent(hits, of_truth)[classes]),
            num_images=num_images,
        )


def boundary_band(labels: Tensor, valid: Tensor, *, width: int) -> Tensor:
    """Find the pixels near a contour: a valid pixel of another class is within `width` rows and columns.

    Returns `(H, W)` bool (Boundary IoU, Cheng et al. 2021). Neither the image's border nor a border to ignored pixels
    is a contour (the paper counts the former). A class's band is its mask less the eroded mask; over all classes at
    once, these are the pixels whose neighbourhood has a higher or a lower class index than they have.
    """
    index = labels.float()
    highest, negated_lowest = (
        F.max_pool2d(
            torch.where(valid, signed, -IGNORE_INDEX - 1.0)[None, None], 2 * width + 1, stride=1, padding=width
        )[0, 0]
        for signed in (index, -index)
    )
    return valid & ((highest != index) | (negated_lowest != -index))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `100 * part / whole`, NaN if there is nothing to divide by."""
    with np.errstate(invalid="ignore"):
        return 100.0 * np.asarray(part) / np.asarray(whole)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def _null(value: Any) -> Any:
    """Turn NaN into None, within lists too: JSON has no NaN."""
    if isinstance(value, list):
        return [_null(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
