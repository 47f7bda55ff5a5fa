"""README.md beside a model's weights, for people: its classes, data, scores, training and licences, and how to use it.

It is written anew from the card (config.json) at each save; nothing reads it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from iccld.models.model_card import ModelCard, ModelStage

README_NAME = "README.md"
_ENCODER_LICENCES = {
    "nvidia/mit-": "NVIDIA Source Code License for SegFormer (no commercial use)",
    "nvidia/segformer-": "NVIDIA Source Code License for SegFormer (no commercial use)",
    "facebook/dinov2-": "Apache-2.0",
    "facebook/dinov3-": "DINOv3 License",
}
"""Licences by the beginning of the hub's name; other encoders have an unknown licence."""
_OPENING = """\
---
library_name: iccld
pipeline_tag: image-segmentation
license: unknown
tags: [iccld, domain-adaptation, semantic-segmentation, model_hub_mixin]
---
"""
_USE = """\
```python
from iccld import ICCLD
model = ICCLD.from_pretrained("FOLDER, RUN DIRECTORY OR HUB ID")
result = model.predict("street.jpg"){steps}
```

`result` has `labels`, `probabilities`, `uncertainty`, `names`, `colours`, `overlay()` and `save(path)`."""


def describe(card: ModelCard) -> str:
    """Write the page, with the metadata that the hub reads; it says so where a fact is not known."""
    sections = {
        "Use": _USE.format(steps="" if card.stage is ModelStage.segmentation else "  # num_steps=4 denoises"),
        "Classes": "\n".join(_classes(card)),
        "Data": "\n".join(_data(card.origin)),
        "Scores": "\n".join(_scores(card)),
        "Training": "\n".join(_training(card)),
        "Licences": "\n".join(_licences(card)),
    }
    opening = f"{_OPENING}\n# Semantic segmentation of {len(card.class_names)} classes (ICCLD)\n"
    return opening + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _classes(card: ModelCard) -> Iterator[str]:
    of_class = card.origin.get("label_ids")
    of_class = of_class if isinstance(of_class, Mapping) else {}
    yield "| index | class | colour |" + (" ids in the shards' labels |" if of_class else "")
    yield "|---|---|---|" + ("---|" if of_class else "")
    for index, (name, colour) in enumerate(zip(card.class_names, card.palette, strict=True)):
        row = f"| {index} | {_plain(name)} | #{''.join(f'{part:02x}' for part in colour)} |"
        yield row + (f" {_ids(of_class.get(name))} |" if of_class else "")


def _ids(of_class: Any) -> str:
    """`7 road, 8 sidewalk`: the ids of a class with what they stand for."""
    return _plain(", ".join(f"{key} {name}" for key, name in of_class.items()) if isinstance(of_class, Mapping) else "")


def _data(origin: Mapping[str, Any]) -> Iterator[str]:
    sets = origin.get("data")
    roles = {"source": "Source (images with labels)", "target": "Target (images alone)"}
    for role, what in roles.items():
        names = sets.get(role) if isinstance(sets, Mapping) else None
        yield f"- {what}: {', '.join(map(_plain, names)) if isinstance(names, list) and names else 'unknown'}."


def _scores(card: ModelCard) -> Iterator[str]:
    given = card.origin.get("scores")
    tables = [table for table in given if _is_table(table)] if isinstance(given, list) else []
    if not tables:
        yield "Not scored when this was written."
        return
    yield "IoU in per cent. Each column was computed by `iccld evaluate` with these weights, known by their checksum."
    yield from ("", "|  | " + " | ".join(_plain(table["name"]) for table in tables) + " |")
    yield "|---|" + "---|" * len(tables)
    rows = {"images": "num_images", "mIoU": "miou"}
    for label, key in rows.items():
        yield f"| {label} | " + " | ".join(_number(table[key]) for table in tables) + " |"
    for name in tables[0]["iou"]:
        yield f"| {_plain(name)} | " + " | ".join(_number(table["iou"].get(name)) for table in tables) + " |"
    yield from ("", *(f"- {_plain(table['name'])}: {_plain(table['provenance'])}." for table in tables))


def _is_table(scores: Any) -> bool:
    """Tell whether they are scores as `iccld evaluate` gives them; a stranger's may be anything."""
    match scores:
        case {"name": str(), "provenance": str(), "num_images": int(), "miou": float() | int() | None, "iou": dict()}:
            return True
    return False


def _training(card: ModelCard) -> Iterator[str]:
    origin = card.origin
    how = {
        ModelStage.segmentation: "encoder and decoder, by self-training on source and target images",
        ModelStage.adversarial: "the same, and a denoiser of the latent against a discriminator of domains",
    }
    yield f"- Method: Inter-Coder Connected Latent Diffusion (arXiv 2412.16859); trained: {how[card.stage]}."
    if card.deterministic:
        yield "- Its denoiser never saw noise: it takes one step, and has no seeds."
    for key, what in {"weights": "Weights", "step": "Optimiser steps of the last stage", "version": "iccld"}.items():
        yield f"- {what}: {_plain(origin.get(key, 'unknown'))}."
    if isinstance(score := origin.get("score"), Mapping):
        yield (
            f"- Chosen by its score in training, which flatters it: mIoU {_number(score.get('miou'))} on "
            f"{_number(score.get('num_images'))} images, {_number(score.get('num_steps'))} denoising steps."
        )


def _licences(card: ModelCard) -> Iterator[str]:
    encoder = card.origin.get("encoder") or ""
    licence = next((text for start, text in _ENCODER_LICENCES.items() if str(encoder).startswith(start)), "unknown")
    yield "- Code: Apache-2.0."
    yield f"- Encoder that training started from: {_plain(encoder) if encoder else 'unknown'}; its licence: {licence}."
    yield "- Data: see each set's terms; some forbid commercial use, also of what is trained on them."
    yield "- These weights: unknown; whoever shares them decides, within the terms above."


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    """Make a word safe for a Markdown table; anyone may have written the card."""
    return "".join(c if c.isprintable() and c not in "|<>`[]" else " " for c in str(value))[:200]
