"""Sample pictures by a rule: the baseline's best, median and worst validation image, the same for all runs.

An image's score is its mIoU under the baseline's model of the first finished seed, scored as its row is.
"""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iccld.config import Config
from iccld.data.stream.validation import read_validation
from iccld.evaluation import Predict, evaluate, windowed
from iccld.inference.pictures import colourise, comparison_picture, save_picture
from iccld.models.attention import default_device_type
from iccld.programs.ablate.paired import choose_images
from iccld.programs.ablate.rows import Ablation
from iccld.programs.ablate.summary import RowFigures
from iccld.programs.ablate.tasks import Task
from iccld.programs.evaluate.evaluate import load_matching_model
from iccld.programs.evaluate.results import finished_models
from iccld.stages.table import stage_of

MAX_RUNS = 6  # the most runs in a picture
Sample = Mapping[str, Any]
"""Sample as `read_validation` gives it."""


def write_pictures(ablation: Ablation, rows: Mapping[str, RowFigures]) -> tuple[dict[str, str], list[str]]:
    """Write `pictures_1.png`, ...; returns the chosen images' keys by rank, and the files' names."""
    baseline = rows[ablation.grid.baseline]
    if not baseline.runs:
        return {}, []
    seed = next(iter(baseline.runs))
    chosen = choose(ablation, Task(baseline.name, seed))
    shown = [name for name, row in rows.items() if seed in row.runs]
    columns = {name: _predictions(ablation, Task(name, seed), list(chosen.values())) for name in shown}
    palette = ablation.configs[baseline.name].data.class_set.build().palette
    names: list[str] = []
    for start in range(0, len(shown), MAX_RUNS):
        part = shown[start : start + MAX_RUNS]
        grid = [
            [s["image"], colourise(s["labels"], palette), *(colourise(columns[name][i], palette) for name in part)]
            for i, s in enumerate(chosen.values())
        ]
        names.append(f"pictures_{len(names) + 1}.png")
        path = ablation.folder / names[-1]
        save_picture(comparison_picture(grid, ["image", "truth", *part]), path)
    return {rank: f"{sample['key']} (seed {seed})" for rank, sample in chosen.items()}, names


def choose(ablation: Ablation, task: Task) -> dict[str, Sample]:
    """Choose the best, the median and the worst image under a run's model."""
    config = ablation.config(task)
    device, predict = default_device_type(), predictor_of_row(config)
    scores: dict[int, float] = {}
    for sample in _samples(config):
        result = evaluate(
            [sample], predict, class_set=config.data.class_set.build(), config=config.evaluation, device=device
        )
        scores[sample["number"]] = result.miou
    chosen = choose_images(scores)
    samples = {sample["number"]: sample for sample in _samples(config) if sample["number"] in chosen.values()}
    return {rank: samples[number] for rank, number in chosen.items()}


def _samples(config: Config) -> Iterator[dict[str, Any]]:
    """Return the validation images that are scored."""
    most = config.evaluation.max_images
    samples = read_validation(config.data)
    return takewhile(lambda sample: sample["number"] < most, samples) if most else iter(samples)


def predictor_of_row(config: Config) -> Predict:
    """Return the predictor of the last stage, with as many denoising steps as the row is scored with."""
    model = load_matching_model(finished_models(config)[-1], config).to(default_device_type())
    kind = stage_of(model)
    num_steps = kind.shown_steps(config.inference)
    return kind.predictor(model, config.inference, seed=config.seed, num_steps=num_steps)


def _predictions(ablation: Ablation, task: Task, samples: list[Sample]) -> list[np.ndarray]:
    """Return `(H, W)` uint8 class indices of each sample."""
    config = ablation.config(task)
    device, predict = default_device_type(), windowed(predictor_of_row(config), config.evaluation)
    found: list[np.ndarray] = []
    for sample in samples:
        images: Tensor = torch.from_numpy(sample["image"]).to(device).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            logits = predict(images, torch.tensor([sample["number"]], device=device))
        found.append(logits.argmax(1)[0].to(torch.uint8).cpu().numpy())
    return found
