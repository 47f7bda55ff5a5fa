"""`iccld predict`: label maps and overlays of an image or a folder, by a model folder alone."""

import argparse
import re
from pathlib import Path

import torch

from iccld.evaluation import EvaluationConfig, windowed
from iccld.labels import ClassSet
from iccld.models.attention import AttentionBackend
from iccld.models.iccld import ICCLD
from iccld.predict import predict_path
from iccld.programs.evaluate.evaluate import predict_function

DESCRIPTION = """\
Segment an image or a folder of images: a label PNG and an overlay of each.

  iccld predict runs/a image.jpg out/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld predict`."""
    parser.add_argument("model", type=Path, help="a model folder or a run directory")
    parser.add_argument("input", type=Path, help="an image, or a folder of images")
    parser.add_argument("output", type=Path, help="the folder for label PNGs and overlays")
    parser.add_argument("--num-steps", type=int, default=0, help="denoising steps; 0 (default): the decoder alone")
    parser.add_argument("--size", default="", metavar="HxW", help="resize images for the model, as in 512x1024")
    parser.add_argument("--sliding-window", action="store_true", help="segment overlapping windows of each image")
    parser.add_argument("--attention", choices=["sdpa", "xformers"], default="sdpa", help="back end of the denoiser")


def run(arguments: argparse.Namespace) -> None:
    """Segment what the arguments name. Raises ValueError for what the user got wrong."""
    if arguments.size and not re.fullmatch(r"\d+x\d+", arguments.size):
        raise ValueError(f"--size {arguments.size} must be HEIGHTxWIDTH, as in 512x1024.")
    image_size = [int(side) for side in arguments.size.split("x")] if arguments.size else []
    predict_images(
        arguments.model,
        arguments.input,
        arguments.output,
        num_steps=arguments.num_steps,
        config=EvaluationConfig(image_size=image_size, sliding_window=arguments.sliding_window),
        attention=AttentionBackend[arguments.attention],
    )


def predict_images(
    model_folder: Path,
    path: Path,
    output: Path,
    *,
    num_steps: int,
    config: EvaluationConfig,
    attention: AttentionBackend,
) -> list[Path]:
    """Segment `path` into `output` and return the label PNGs written. `num_steps`: 0 is the decoder alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ICCLD.from_pretrained(find_model(model_folder), attention=attention).to(device)
    assert model.card is not None
    names, palette = model.card.class_names, [(r, g, b) for r, g, b in model.card.palette]
    class_set = ClassSet(tuple(names), tuple(palette), {i: i for i in range(len(names))})
    predict = windowed(predict_function(model, num_steps=num_steps, seed=0), config)
    return predict_path(path, output, predict, class_set=class_set, device=device)


def find_model(folder: Path) -> Path:
    """The folder itself, or the last finished stage's teacher where it is a run directory."""
    for candidate in (folder, folder / "stage2/final/teacher", folder / "stage1/final/teacher"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{folder} is neither a model folder (config.json, model.safetensors) nor a run directory with a finished "
        f"stage; give one, or let the same train command finish."
    )
