"""Run directories made by hand, as `train` leaves them: quick, and the same each time."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iccld.inference.pictures import overlay
from iccld.plain_yaml import to_yaml

CLASSES = {"lane": (128, 64, 128), "kerb & grass": (107, 142, 35), "car": (0, 0, 142), "<b>bike</b>": (220, 20, 60)}
"""Classes of one's own; the last tries to be markup."""
BEGAN = 1_750_000_000.0
STEP_S = 2.0


def make_run(folder: Path, *, num_steps: int = 200, done: int = 200, gain: float = 0.0, **settings: Any) -> Path:
    """A run of stage 1, killed once at half of what is `done`; finished and scored if all steps are done.

    `gain` is added to all scores. `settings` by whole names, with `__` for the points.
    """
    folder.mkdir(parents=True)
    values: dict[str, Any] = {"run_dir": str(folder), "seed": 0, "stages": ["stage1"]}
    values["stage1"] = {"trainer": {"num_steps": num_steps, "evaluate_every": 50}}
    for name, value in settings.items():
        place = values
        *parents, last = name.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    (folder / "config.yaml").write_text(to_yaml(values))
    write_lines(folder / "events.jsonl", _events(done, num_steps))
    write_lines(folder / "metrics.jsonl", _metrics(done, gain))
    (folder / "lock").write_text("released")
    checkpoint = folder / f"stage1/checkpoints/step_{done:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    if done == num_steps:
        _finish(folder, gain)
    return folder


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _events(done: int, num_steps: int) -> list[dict[str, Any]]:
    middle = done // 2
    layout = {"engine": "ddp", "world_size": 2, "precision": "bf16"}
    events: list[dict[str, Any]] = []
    clock = BEGAN
    for first, last in ((0, middle + 10), (middle, done)):
        events.append({"event": "launched", "time": clock + 10, "since": clock})
        events.append({"event": "started", "time": clock + 30, "stage": "stage1", "step": first, "layout": layout})
        seconds = {"total": STEP_S * (last - first), "data": 0.1 * (last - first), "evaluate": 4.0, "save": 1.5}
        clock += 30 + seconds["total"] + 1
        progress = {"event": "progress", "time": clock, "stage": "stage1", "step": last}
        events.append(progress | {"num_steps": last - first, "seconds": seconds})
        events.append({"event": "saved", "time": clock, "stage": "stage1", "step": min(last, done)})
        clock += 60
    warning = "the pseudo-labels have lost <i>kerb</i>; try data.rare_class_sampling=true."
    events.append({"event": "warning", "time": clock - 58, "stage": "stage1", "sign": "lost_classes", "words": warning})
    kind = "finished" if done == num_steps else "preempted"
    return [*events, {"event": kind, "time": clock - 50, "stage": "stage1", "step": done}]


def _metrics(done: int, gain: float) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(9, done, 10):
        source, mixed = 2.5 * math.exp(-step / 90) + 0.1 * math.sin(step), 1.4 * math.exp(-step / 130)
        entry: dict[str, Any] = {"stage": "stage1", "step": step, "loss": source + mixed}
        entry |= {"loss/source": source, "loss/mixed": mixed, "learning_rate": 6e-5 * (1 - step / 220)}
        entry |= {"gradient_norm": 3 + math.cos(step / 9), "samples_per_s": 3.8 + 0.2 * math.sin(step), "peak_gib": 4.5}
        entries.append(entry | {"data_wait": 0.05, "disagreement": 0.3 - step / 1500})
        if (step + 1) % 50 == 0:
            entries.append(
                {"stage": "stage1", "step": step, "miou": 20 + step / 8 + gain, "boundary_miou": 12 + step / 12}
            )
    return entries


def _finish(folder: Path, gain: float) -> None:
    model = folder / "stage1/final/teacher"
    model.mkdir(parents=True)
    card = {"class_names": list(CLASSES), "palette": [list(colour) for colour in CLASSES.values()]}
    (model / "config.json").write_text(json.dumps(card))
    iou = [91.2 + gain, 40.5 - gain, 62.0 + 2 * gain, None]
    scores = {"names": list(CLASSES), "iou": iou, "boundary_iou": iou, "miou": 64.57 + gain, "boundary_miou": 41.0}
    scores |= {"pixel_accuracy": 90.1, "mean_accuracy": 70.2, "num_images": 60}
    figures = {"num_images": 8, "stage1": {"miou": 64.0, "boundary_miou": 41.0, "changed": 0.0}}
    results = {"about": {"data": {"shards": "validation"}}, "stage1": scores, "diagnostics": {"stage1": figures}}
    (folder / "report").mkdir()
    (folder / "report/results.json").write_text(json.dumps(results))
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(_street(number)).save(folder / f"pictures/street_{number}_overlay.png")


def _street(number: int) -> np.ndarray:
    """`(96, 192, 3)` uint8: a road between grass with a car on it, under noise."""
    y, x = np.mgrid[:96, :192]
    labels = np.full((96, 192), 255, np.uint8)
    labels[y > 40] = 1
    labels[(y > 40) & (abs(x - 96) < (y - 30))] = 0
    labels[(abs(x - 80 - 15 * number) < 14) & (abs(y - 62) < 9)] = 2
    image = np.random.default_rng(number).integers(90, 200, (96, 192, 3), np.uint8)
    return overlay(image, labels, tuple(CLASSES.values()))
