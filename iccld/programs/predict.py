"""`iccld predict`: label maps and overlays of images, folders and videos, by a trained model."""

import argparse
import re
from functools import partial
from pathlib import Path

DESCRIPTION = """\
Segment images: for each a label PNG (pixel values are class indices), an overlay, and one legend.png.
An OUTPUT that ends in .png is the label PNG of one image; of a video, OUTPUT is its overlay (.mp4) or a folder.

  iccld predict runs/a image.jpg out/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld predict`."""
    add = parser.add_argument
    add("model", help="a model folder, a run directory, or owner/name on the hub")
    add("input", type=Path, nargs="+", help="images, folders of images, patterns in quotes, or one video")
    add("output", type=Path, help="a folder, or a file for one image (.png) or a video (.mp4)")
    add("--num-steps", type=int, default=0, help="denoising steps; 0 (default): the decoder alone")
    add("--solver", choices=["ddim", "dpm"], default="ddim", help="how the steps follow the denoiser (default ddim)")
    add("--start", type=float, default=1.0, help="where denoising begins: 1 (default) is pure noise, 0.5 half-way")
    add("--num-averaged", type=int, default=1, help="average so many denoised maps (default 1)")
    add("--blend", type=float, default=0.0, help="share of the decoder alone in them (default 0)")
    add("--size", default="", metavar="HxW", help="resize images for the model, as in 512x1024")
    add("--sliding-window", action="store_true", help="segment overlapping windows, not the whole image")
    about = "of a run (default teacher); best: the teacher that scored best in training"
    add("--weights", choices=["teacher", "student", "best"], default="teacher", help=about)
    add("--probabilities", action="store_true", help="write STEM_probabilities.npz, too (float16: K, H, W)")
    add("--device", default="", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass (default fp32)")
    add("--attention", choices=["sdpa", "xformers"], default="sdpa", help="back end of the denoiser")


def run(arguments: argparse.Namespace) -> int:
    """Segment the inputs. Raises ValueError, and OSError if the output cannot be written."""
    size = _size(arguments.size)
    _check_denoising(arguments)
    from iccld.inference.files import expanded, predict_files
    from iccld.inference.model import ICCLD, moved
    from iccld.inference.source import load_model
    from iccld.inference.video import is_video, predict_video
    from iccld.models.attention import default_device_type
    from iccld.models.settings import AttentionBackend
    from iccld.solver import Solver
    from iccld.stages.settings import InferenceConfig

    inputs = expanded(arguments.input)
    videos = [path for path in inputs if is_video(path)]
    if videos and (len(inputs) > 1 or arguments.probabilities):
        raise ValueError(f"predict: {videos[0]} is a video, which is predicted alone, and without --probabilities.")
    attention = AttentionBackend[arguments.attention]
    load = partial(ICCLD.from_pretrained, attention=attention)
    model = load_model(arguments.model, load, weights=arguments.weights)
    segment = moved(model, arguments.device or default_device_type()).segmenter(
        num_steps=arguments.num_steps,
        size=size,
        sliding_window=arguments.sliding_window,
        precision=arguments.precision,
        inference=InferenceConfig(
            solver=Solver[arguments.solver],
            start=arguments.start,
            num_averaged=arguments.num_averaged,
            blend=arguments.blend,
        ),
    )
    if videos:
        predict_video(videos[0], arguments.output, segment)
    else:
        predict_files(inputs, arguments.output, segment, with_probabilities=arguments.probabilities)
    return 0


def _check_denoising(arguments: argparse.Namespace) -> None:
    """Refuse options of denoising that would change nothing. Raises ValueError."""
    usual = {"--solver": "ddim", "--start": 1.0, "--num-averaged": 1, "--blend": 0.0}
    given = [name for name, value in usual.items() if getattr(arguments, name[2:].replace("-", "_")) != value]
    if given and not arguments.num_steps:
        raise ValueError(f"{', '.join(given)} without --num-steps: nothing is denoised; add --num-steps, as in 4.")


def _size(text: str) -> list[int]:
    if text and not re.fullmatch(r"\d+x\d+", text):
        raise ValueError(f"--size {text} must be HEIGHTxWIDTH, as in 512x1024.")
    return [int(side) for side in text.split("x")] if text else []
