"""Scores that `iccld evaluate` wrote of a run's model, found by its weights' checksum, for the model's card."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iccld.models.model_card import ModelCard
from iccld.reading import MIB, read_json


def scores_of(run_dir: Path, card: ModelCard) -> list[dict[str, Any]]:
    """Return the scores of these weights in `run_dir/report/results*.json`; [] if there is no such file.

    Each has `name`, `num_images`, `miou`, `iou` (per cent by class; None for what did not occur) and `provenance`.
    A file that is damaged, or of other weights, is passed over.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(run_dir.glob("report/results*.json")):
        try:
            results = read_json(path, 64 * MIB)
            checksums = results["about"]["sha256"]
            if card.weights_sha256 and card.weights_sha256 in checksums:
                found += _tables(results, path.name, position=checksums.index(card.weights_sha256))
        except (ValueError, TypeError, LookupError, AttributeError, OSError):
            continue
    return found


def _tables(results: Mapping[str, Any], file: str, *, position: int) -> Iterator[dict[str, Any]]:
    about = results["about"]
    folder = Path(about["models"][position])
    stage = folder.parts[-3] if len(about["models"]) > 1 else ""
    data = about["data"]
    where = str(data.get("name") or Path(data["shards"]).name)
    for key, scores in results.items():
        if key in ("about", "diagnostics") or not key.startswith(stage) or key.endswith("mean_latent"):
            continue
        by_steps = {"": scores} if "miou" in scores else {f", {steps} steps": part for steps, part in scores.items()}
        for steps, part in by_steps.items():
            size = "x".join(map(str, about["image_size"])) if about["image_size"] else "the images' size"
            how = f"windows at {size}" if about["sliding_window"] else f"whole images at {size}"
            yield {
                "name": f"{where}{steps}",
                "num_images": part["num_images"],
                "miou": part["miou"],
                "iou": dict(zip(part["names"], part["iou"], strict=True)),
                "provenance": f"report/{file}, {how}, {about['precision']}, seed {about['seed']}",
            }
