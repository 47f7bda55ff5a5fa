"""`iccld predict`: label maps and overlays of an image or a folder, by a model folder alone."""

from pathlib import Path

import torch

from iccld.evaluation import EvaluationConfig, windowed
from iccld.labels import ClassSet
from iccld.models.attention import AttentionBackend
from iccld.models.iccld import ICCLD
from iccld.predict import predict_path
from iccld.stages.predictor import InferenceConfig
from iccld.stages.table import STAGES, stage_of


def predict_images(
    model_folder: Path,
    path: Path,
    output: Path,
    *,
    num_steps: int,
    inference: InferenceConfig,
    config: EvaluationConfig,
    attention: AttentionBackend,
) -> list[Path]:
    """Segment `path` into `output` and return the label PNGs written.

    `num_steps`: 0 is the decoder alone; what is averaged is as `inference` says.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ICCLD.from_pretrained(find_model(model_folder), attention=attention).to(device)
    assert model.card is not None
    names, palette = model.card.class_names, [(r, g, b) for r, g, b in model.card.palette]
    class_set = ClassSet(tuple(names), tuple(palette), {i: i for i in range(len(names))})
    predict = stage_of(model).predictor(model, inference, seed=0, num_steps=num_steps)
    return predict_path(path, output, windowed(predict, config), class_set=class_set, device=device)


def find_model(folder: Path) -> Path:
    """The folder itself, or the last finished stage's teacher where it is a run directory."""
    for candidate in (folder, *(folder / name / "final/teacher" for name in reversed(STAGES))):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{folder} is neither a model folder (config.json, model.safetensors) nor a run directory with a finished "
        f"stage; give one, or let the same train command finish."
    )
