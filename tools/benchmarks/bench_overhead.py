"""Cost of the inter-coder connection: time, memory and FLOPs with it and without, over resolutions and classes.

    python tools/benchmarks/bench_overhead.py --json overhead.json --png overhead.png    2 minutes on 2 CPU cores
    python tools/benchmarks/bench_overhead.py --model mit_b5 --sizes 256 512 768 --batch-size 4 --precision bf16    GPU

The two models differ in `model.decoder.inter_coder` alone. `train` is the forward and backward pass of stage 1's module
over source and mixed images, `infer` is `segment`; they take turns in rounds. Times are medians; memory is the peak
above what the model and its inputs hold; FLOPs are counted from shapes. The overhead, with less without, is fitted by
a + b * megapixels + c * classes, pixels being those of all images of a pass; +- is the standard error.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from overhead_law import MODES, QUANTITIES, draw, laws_of, laws_table, points_table
from rich.console import Console
from torch import Tensor

from iccld.config import load_config
from iccld.models.iccld import ICCLD
from iccld.models.settings import EncoderConfig, ModelConfig
from iccld.runtime.measure.flops import FlopCounter, on_meta
from iccld.runtime.measure.peaks import wait_for
from iccld.stages.base import StageInputs
from iccld.stages.segmentation import SegmentationModule
from iccld.stages.settings import SegmentationConfig

BACKBONES: dict[str, dict[str, Any]] = {  # of models whose configuration names published weights
    "mobilenet_v2": {"model_type": "mobilenet_v2"},
    "mit_b5": {
        "model_type": "segformer",
        "depths": [3, 6, 40, 3],
        "hidden_sizes": [64, 128, 320, 512],
        "num_attention_heads": [1, 2, 5, 8],
    },
}
VIEWS = ("source", "mixed")


class Case(NamedTuple):
    """One resolution and number of classes; both models do the same work on the same tensors."""

    size: int
    num_classes: int
    runs: dict[tuple[str, str], Callable[[], Any]]  # by mode, and "with" or "without"
    flops: dict[tuple[str, str], int]


def model_config(name: str, *, connected: bool) -> ModelConfig:
    """A packaged model, built without weights, with or without the connection."""
    config = load_config([f"model={name}"]).model
    if name in BACKBONES:
        encoder = EncoderConfig(backbone_config=BACKBONES[name], width=config.encoder.width)
        config = replace(config, encoder=encoder)
    return replace(config, decoder=replace(config.decoder, inter_coder=connected))


def make_case(settings: argparse.Namespace, size: int, num_classes: int, device: torch.device) -> Case:
    shape = (settings.batch_size, size, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape[0], 3, size, size, generator=generator).to(device)
    labels = torch.randint(num_classes, shape, generator=generator, dtype=torch.uint8).to(device)
    runs, flops = {}, {}
    for variant in ("with", "without"):
        torch.manual_seed(0)
        config = model_config(settings.model, connected=variant == "with")
        model = ICCLD(config=config, num_classes=num_classes, with_denoiser=False)
        for mode in MODES:
            flops[mode, variant] = count(mode, *on_meta((model, images, labels)))
            own = model.to(device)
            runs[mode, variant] = lambda mode=mode, own=own: run(mode, own, images, labels, settings.precision)
    return Case(size, num_classes, runs, flops)


def run(mode: str, model: ICCLD, images: Tensor, labels: Tensor, precision: str = "fp32") -> Tensor:
    """One pass; of `train`, the losses are returned after their backward pass, and no gradient stays."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        if mode == "infer":
            with torch.inference_mode():
                return model.segment(images)
        losses = train_losses(model, images, labels)
    losses.backward()
    model.zero_grad()
    return losses


def train_losses(model: ICCLD, images: Tensor, labels: Tensor) -> Tensor:
    count = torch.full((), float(labels.numel()), device=labels.device)
    tensors = {f"{view}_images": images for view in VIEWS} | {f"{view}_labels": labels for view in VIEWS}
    module = SegmentationModule(model, SegmentationConfig())
    return torch.stack(list(module(StageInputs(tensors, dict.fromkeys(VIEWS, count))).losses.values())).sum()


def count(mode: str, model: ICCLD, images: Tensor, labels: Tensor) -> int:
    """The pass's FLOPs; everything is on device meta."""
    with FlopCounter({}) as counter:
        if mode == "infer":
            model.segment(images)
            return counter.forward.total()
        losses = train_losses(model, images, labels)
    return counter.forward.total() + counter.backward([losses]).total()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most that tensors take while it runs, above what they took before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def measure(case: Case, *, rounds: int, batch_size: int, device: torch.device) -> list[dict[str, Any]]:
    """A point for each mode: the costs of both models, which take turns."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in case.runs}
    memory = {}
    for key, work in case.runs.items():
        work()  # warm
        memory[key] = peak_bytes(work, device)
    for i in range(rounds):
        for key in list(case.runs)[:: 1 if i % 2 else -1]:
            times[key].append(seconds(case.runs[key], device))
    points = []
    for mode in MODES:
        megapixels = (len(VIEWS) if mode == "train" else 1) * batch_size * case.size**2 / 1e6
        point: dict[str, Any] = {"mode": mode, "size": case.size, "classes": case.num_classes, "megapixels": megapixels}
        for key in ((mode, "with"), (mode, "without")):
            values = statistics.median(times[key]), memory[key], case.flops[key]
            point[key[1]] = dict(zip(QUANTITIES, values, strict=True))
        pairs = zip(times[mode, "with"], times[mode, "without"], strict=True)
        point["overhead"] = {name: point["with"][name] - point["without"][name] for name in QUANTITIES}
        point["overhead"]["seconds"] = statistics.median(one - other for one, other in pairs)  # of neighbours in time
        point["relative"] = {name: point["overhead"][name] / point["without"][name] for name in QUANTITIES}
        points.append(point)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=("tiny", *BACKBONES), default="tiny", help="default %(default)s")
    add("--sizes", type=int, nargs="+", default=[128, 256, 384, 512], help="sides of the images in pixels")
    add("--classes", type=int, nargs="+", default=[13, 19, 100], help="default %(default)s")
    add("--batch-size", type=int, default=1, help="images of each domain (default %(default)s)")
    add("--rounds", type=int, default=15, help="timed turns of each (default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default %(default)s")
    add("--png", type=Path, default=Path("overhead.png"), help="default %(default)s")
    add("--json", type=Path, help="all figures")
    settings = parser.parse_args()
    for name, least in (("sizes", 32), ("classes", 2), ("batch_size", 1), ("rounds", 1)):
        given = getattr(settings, name)
        if min(given if isinstance(given, list) else [given]) < least:
            parser.error(f"--{name.replace('_', '-')} {given} must be at least {least}.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory's profile has nothing to say
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points = []
    for size in settings.sizes:
        for num_classes in settings.classes:
            case = make_case(settings, size, num_classes, device)
            points += measure(case, rounds=settings.rounds, batch_size=settings.batch_size, device=device)
    laws = laws_of(points)
    for table in (points_table(points), laws_table(laws)):
        Console().print(table)
    draw(points, laws, settings.png)
    if settings.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
        about = {"settings": options, "device": name, "versions": {"torch": version("torch")}}
        settings.json.write_text(json.dumps({"laws": laws, "points": points, **about}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_overhead: {error}")
