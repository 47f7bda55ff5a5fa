"""The demo's end: one table and one results.json of its runs, and a picture of image, truth and predictions."""

import json
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from iccld.config import Config
from iccld.data.stream.validation import read_validation
from iccld.durable import replacing, write_whole
from iccld.evaluation import results_table
from iccld.inference.pictures import colourise, comparison_picture
from iccld.models.iccld import ICCLD
from iccld.programs.evaluate.evaluate import named_results, saved_settings
from iccld.stages.predictor import predictor_of

NUM_PICTURES = 6


def main(folder: Path) -> None:
    results = merged(folder)
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(results_table(named_results(results), title="embedded data set, game to camera, validation set"))
    draw(folder, saved_settings(folder / "adapted", []))
    print(f"figures: {folder / 'results.json'}   picture: {folder / 'comparison.png'}")


def merged(folder: Path) -> Mapping[str, Any]:
    """Scores by name: `source_only`, what the adapted run's report holds, and stage 2 of the `twin`."""
    source_only, adapted, twin = (
        json.loads((folder / run / "report" / "results.json").read_text()) for run in ("source_only", "adapted", "twin")
    )
    del adapted["about"]
    return {"source_only": source_only["stage1"], **adapted, "twin": twin["stage2"]}


def draw(folder: Path, config: Config) -> None:
    """One row an image: the image, the truth, each prediction."""
    palette = config.data.class_set.build().palette
    stage1, stage2 = (
        ICCLD.from_pretrained(folder / "adapted" / stage / "final/teacher") for stage in ("stage1", "stage2")
    )
    source_only = ICCLD.from_pretrained(folder / "source_only/stage1/final/teacher")
    predictors = {"source only": (source_only, 0), "stage 1": (stage1, 0)}
    predictors |= {f"stage 2, steps: {steps}": (stage2, steps) for steps in config.inference.num_steps}
    rows = []
    for sample in islice(read_validation(config.data), NUM_PICTURES):
        images = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None].float() / 255
        row = [sample["image"], colourise(sample["labels"], palette)]
        for model, num_steps in predictors.values():
            with torch.no_grad():
                predict = predictor_of(model, config.inference, seed=config.seed, num_steps=num_steps)
                labels = predict(images, torch.tensor([sample["number"]])).argmax(1)[0]
            row.append(colourise(labels.numpy().astype(np.uint8), palette))
        rows.append(row)
    with replacing(folder / "comparison.png") as file:
        comparison_picture(rows, ["image", "truth", *predictors]).save(file, format="PNG")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
