"""Diagnostics of the latent and of the denoiser: scores of an image's maps under different latents.

All maps of an image are decoded with the image's own features; they differ in the latent:

    stage1                     E's latent
    own_latent                 z_0, the true latent (of the image, or of its true labels)
    mean_latent                the mean z_0: what D knows without it (`stage1`, where z_0 is a move of E's latent)
    other_latent               z_0 of another image
    fitted_latent              E's latent after `FIT_STEPS` gradient steps on the true labels: an upper bound
    denoised                   one step of the denoiser from noise
    z_0_at_999 ... z_0_at_249  the z_0 that the denoiser predicts from the true z_t, where four-step sampling passes
    student                    as `denoised` (`stage1` without a denoiser), by the student's weights
    labels_at_16               no model: the labels' class shares in cells of 16 pixels, the yardstick of blur

True labels serve the scores and the upper bound alone: no parameter gets a gradient. Images pass one by one, so that
no figure depends on a batch. `H W` image, `K` classes, `C h w` latent.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iccld import rng
from iccld.diffusion import add_noise, trailing_timesteps
from iccld.eager import without_compiled_code
from iccld.labels import IGNORE_INDEX, ClassSet
from iccld.losses import weighted_cross_entropy
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.scores import Scores
from iccld.settings import EvaluationConfig
from iccld.strides import LATENT_STRIDE

FIT_STEPS = 20
FIT_RATE = 0.1
"""Adam's learning rate, in standard deviations of the latent: 20 steps move no value by more than two of them."""
NUM_TIMESTEPS = 4
BLUR_STRIDE = 2 * LATENT_STRIDE
"""Pixels. D has features of stride 4 and a latent of stride 8; a map whose boundaries are no better than those
of labels seen at stride 16 made no use of either."""
YARDSTICK = f"labels_at_{BLUR_STRIDE}"
BOUNDS = ("mean_latent", "other_latent", "fitted_latent")
"""The figures that need no denoiser: while E and D are frozen they do not change."""


@dataclass(frozen=True)
class Example:
    """An image `(1, 3, H, W)` float in [0, 1], its labels `(1, H, W)` uint8 (255 is ignored), and the number that keys
    its noise.
    """

    images: Tensor
    labels: Tensor
    number: int


@dataclass(frozen=True)
class Figure:
    """Scores in per cent: mIoU, boundary mIoU, and `changed`, the share of pixels with another class than in stage 1.

    The student's `changed` is relative to the teacher's map.
    """

    miou: float
    boundary_miou: float
    changed: float

    def to_json(self) -> dict[str, float | None]:
        """Return plain numbers, null if there is nothing to count."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Diagnosis:
    """Figures by the name of the latent, over `num_images`."""

    figures: Mapping[str, Figure]
    num_images: int

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and dicts."""
        return {"num_images": self.num_images} | {name: figure.to_json() for name, figure in self.figures.items()}

    def to_metrics(self) -> dict[str, float]:
        """Return the mIoU under each latent, and the disagreement of student and teacher, for a line of metrics."""
        metrics = {f"diagnostics/{name}": figure.miou for name, figure in self.figures.items()}
        if "student" in self.figures:
            metrics["diagnostics/disagreement"] = self.figures["student"].changed / 100
        return metrics


@without_compiled_code()  # images come in many sizes
def diagnose(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]],
    model: ICCLD,
    *,
    student: ICCLD | None = None,
    class_set: ClassSet,
    config: EvaluationConfig,
    seed: int,
    with_bounds: bool = True,
    device: torch.device | str = "cpu",
    all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Diagnosis:
    """Score `model` (the teacher) under each latent.

    `pairs`: a sample as `evaluate` takes it, and that of another image, if there is one. `all_reduce` sums a tensor
    over the ranks, each with its own pairs. With `with_bounds=False` the figures in `BOUNDS` are left out.
    """
    options = {"boundary_width": config.boundary_width, "device": device}
    scores = {name: Scores(class_set.num_classes, **options) for name in figure_names(model)}
    changed = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in scores}
    for sample, other in pairs:
        example = make_example(sample, config=config, device=device)
        partner = None if other is None else make_example(other, config=config, device=device)
        maps = dict(label_maps(model, example, partner, seed=seed, with_bounds=with_bounds))
        references = dict.fromkeys(maps, maps["stage1"])
        if student is not None:
            references["student"] = maps["stage1" if model.denoiser is None else "denoised"]
            maps["student"] = segmented(student, example, seed=seed)
        for name, prediction in maps.items():
            scores[name].add(prediction[0], example.labels[0])
            changed[name] += _changed(prediction, references[name], example.labels)
    counts = all_reduce(torch.stack([torch.cat([scores[name].counts, changed[name]]) for name in scores]))
    figures: dict[str, Figure] = {}
    for row, (name, of_name) in zip(counts, scores.items(), strict=True):
        of_name.counts = row[:-2]
        if int(of_name.counts[-1]):
            figures[name] = _figure(of_name, row[-2:], class_set, config)
    return Diagnosis(figures, int(scores["stage1"].counts[-1]))


def figure_names(model: ICCLD) -> list[str]:
    """Return the names of all figures that the model can have, in the order in which they are shown."""
    names = ["stage1", "own_latent", *BOUNDS]
    if model.denoiser is not None:
        names += ["denoised", *(f"z_0_at_{t}" for t in _timesteps(model))]
    return [*names, "student", YARDSTICK]


def make_example(sample: Mapping[str, Any], *, config: EvaluationConfig, device: torch.device | str) -> Example:
    """Turn a sample into one pass's input: at `evaluation.image_size` or, with windows, the middle window.

    Sides are padded to the latent's stride, and labels are brought to the image's size: figures are of that size.
    """
    images = torch.from_numpy(sample["image"]).to(device).permute(2, 0, 1)[None].float() / 255
    labels = torch.from_numpy(sample["labels"]).to(device)[None, None].float()
    if config.image_size:
        images = F.interpolate(images, size=tuple(config.image_size), mode="bilinear", antialias=True)
    labels = F.interpolate(labels, size=images.shape[-2:], mode="nearest-exact")
    if config.sliding_window:
        images, labels = (_middle(tensor, config.window) for tensor in (images, labels))
    height, width = images.shape[-2:]
    sides = (0, -width % LATENT_STRIDE, 0, -height % LATENT_STRIDE)
    labels = F.pad(labels, sides, value=float(IGNORE_INDEX))
    return Example(F.pad(images, sides, mode="replicate"), labels[:, 0].to(torch.uint8), sample["number"])


@torch.no_grad()
def label_maps(
    model: ICCLD, example: Example, other: Example | None, *, seed: int, with_bounds: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield each latent's name and its map: class indices `(1, H, W)` int64."""

    size, encoded = example.images.shape[-2:], model.encoder(example.images)

    def decoded(latent: Tensor) -> Tensor:
        return model.decode(EncoderOutput(latent, encoded.features), size).argmax(dim=1)

    def of_z_0(z_0: Tensor) -> Tensor:
        return decoded(model.decodable(z_0, encoded.latent))

    z_0 = _true_z_0(model, example, encoded)
    yield "stage1", decoded(encoded.latent)
    yield YARDSTICK, blurred(example.labels, stride=BLUR_STRIDE, num_classes=model.num_classes)
    yield "own_latent", of_z_0(z_0)
    if with_bounds:
        yield "mean_latent", of_z_0(torch.zeros_like(z_0))
        yield "fitted_latent", decoded(fitted_latent(model, encoded, example.labels))
    if with_bounds and other is not None:
        yield "other_latent", of_z_0(_resized_z_0(model, other, size=z_0.shape[-2:]))
    if model.denoiser is not None:
        yield "denoised", segmented(model, example, seed=seed)
        condition = model.condition_of(encoded, example.images)
        for t in _timesteps(model):
            z_t, timesteps = _true_z_t(model, z_0, t, number=example.number, seed=seed)
            yield f"z_0_at_{t}", of_z_0(model.denoiser(z_t, timesteps, condition).z_0_pred)


@torch.no_grad()
def segmented(model: ICCLD, example: Example, *, seed: int) -> Tensor:
    """Return the model's own map `(1, H, W)`: one denoising step from keyed noise, or D(E(x)) without a denoiser."""
    if model.denoiser is None:
        return model.segment(example.images).argmax(dim=1)
    shape = model.latent_shape(*example.images.shape[-2:])
    noise = _noise(shape, example.number, "diagnostics", seed=seed, device=example.images.device)
    return model.denoise_segment(example.images, noise=noise, num_steps=1).argmax(dim=1)


def fitted_latent(model: ICCLD, encoded: EncoderOutput, labels: Tensor) -> Tensor:
    """Return E's latent `(1, C, h, w)` after `FIT_STEPS` of Adam on D's cross entropy to the true labels."""
    unit = model.latent_std.view(1, -1, 1, 1)
    move = torch.zeros_like(encoded.latent, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([move], lr=FIT_RATE)
    count = (labels != IGNORE_INDEX).sum()
    for _ in range(FIT_STEPS):
        with torch.enable_grad():
            logits = model.decode(EncoderOutput(encoded.latent + unit * move, encoded.features), labels.shape[-2:])
            loss = weighted_cross_entropy(logits, labels, weights=None, denominator=count)
        (move.grad,) = torch.autograd.grad(loss, [move])  # no parameter gets a gradient
        optimizer.step()
    return encoded.latent + unit * move.detach()


def blurred(labels: Tensor, *, stride: int, num_classes: int) -> Tensor:
    """Return the class `(1, H, W)` that wins when labels are averaged in cells of `stride` pixels and upsampled."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    shares = F.avg_pool2d((labels[:, None] == classes).float(), stride, ceil_mode=True)
    upsampled = F.interpolate(shares, scale_factor=float(stride), mode="bilinear", align_corners=False)
    return upsampled[..., : labels.shape[1], : labels.shape[2]].argmax(dim=1)


def _timesteps(model: ICCLD) -> list[int]:
    """Return the timesteps of four-step sampling; none if the denoiser never sees noise."""
    return [] if model.deterministic else trailing_timesteps(NUM_TIMESTEPS, num_train_steps=len(model.alpha_bar))


def _true_z_0(model: ICCLD, example: Example, encoded: EncoderOutput) -> Tensor:
    """Return z_0, as it is diffused, of the true labels and the clean image, which is also what the denoiser sees."""
    weights = torch.ones_like(example.labels, dtype=torch.float32)
    return model.diffused_latent(clean=encoded.latent, seen=encoded, labels=example.labels, weights=weights)


def _resized_z_0(model: ICCLD, other: Example, *, size: torch.Size) -> Tensor:
    z_0 = _true_z_0(model, other, model.encoder(other.images))
    return z_0 if z_0.shape[-2:] == size else F.interpolate(z_0, size=size, mode="bilinear", align_corners=False)


def _true_z_t(model: ICCLD, z_0: Tensor, t: int, *, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return z_t of z_0 under keyed noise, and t as the denoiser takes it, `(1,)`."""
    timesteps = torch.full((1,), t, device=z_0.device)
    noise = _noise(z_0.shape[1:], number, f"diagnostics {t}", seed=seed, device=z_0.device)
    return add_noise(z_0, noise, timesteps, model.alpha_bar), timesteps


def _noise(shape: Sequence[int], number: int, purpose: str, *, seed: int, device: torch.device) -> Tensor:
    """Draw keyed noise, `(1, *shape)`."""
    return rng.normal(tuple(shape), seed=seed, purpose=purpose, numbers=torch.tensor([number]), device=device)


def _middle(tensor: Tensor, window: list[int]) -> Tensor:
    """Return the middle window of `(1, C, H, W)`; a side shorter than the window is taken whole."""
    for dim, side in zip((-2, -1), window, strict=True):
        length = min(side, tensor.shape[dim])
        tensor = tensor.narrow(dim, (tensor.shape[dim] - length) // 2, length)
    return tensor


def _changed(prediction: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Count, `(2,)` int64, the labelled pixels where two maps differ, and all labelled pixels."""
    valid = labels != IGNORE_INDEX
    return torch.stack([((prediction != reference) & valid).sum(), valid.sum()])


def _figure(scores: Scores, changed: Tensor, class_set: ClassSet, config: EvaluationConfig) -> Figure:
    result = scores.result(class_set, config.num_classes)
    differing, pixels = changed.tolist()
    return Figure(result.miou, result.boundary_miou, 100 * differing / max(1, pixels))
