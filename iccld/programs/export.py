"""`iccld export`: a model as a program of torch.export or as ONNX, compared with the model before it is kept."""

import argparse
import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iccld.outcome import lacks_memory
from iccld.strides import COARSEST_STRIDE, LATENT_STRIDE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from iccld.models.iccld import ICCLD

DESCRIPTION = """\
Write a model that runs without iccld. Inputs: images (B, 3, H, W) float32 in [0, 1], sides multiples of 32, from 64 on,
and with --num-steps the noise (B, C, H / 8, W / 8), standard normal. Output: logits (B, K, H, W). B, H and W are free.

  iccld export runs/a model.onnx
"""
SIZES = ((2, 96, 160), (1, 128, 192), (1, 160, 96))
"""Batch, height and width of the images on which both are compared; the first is the one that is traced."""
TOLERANCE = 1e-3
"""The largest difference of logits, as a share of the largest logit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld export`."""
    add = parser.add_argument
    add("model", help="a model folder, a run directory, or owner/name on the hub")
    add("output", type=Path, help="the file: .pt2 (torch) or .onnx")
    add("--format", choices=["torch", "onnx"], default="", help="torch.export or ONNX (default: by the file's ending)")
    add("--num-steps", type=int, default=0, help="denoising steps; 0 (default): the decoder alone")
    about = "of a run (default teacher); best: the teacher that scored best in training"
    add("--weights", choices=["teacher", "student", "best"], default="teacher", help=about)
    add("--images", type=Path, nargs="+", default=[], help="compare on these; default: three made-up pictures")


def run(arguments: argparse.Namespace) -> int:
    """Export, compare, keep. Raises ValueError if the export differs from the model."""
    import os

    kind = arguments.format or {".onnx": "onnx", ".pt2": "torch"}.get(arguments.output.suffix, "")
    if not kind:
        raise ValueError(f"export: {arguments.output} must end in .pt2 or .onnx, or give --format.")
    if os.path.lexists(arguments.output):
        raise ValueError(f"export: {arguments.output} exists; give a file that does not.")
    if kind == "onnx":  # what is missing is named before the work
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

    from iccld.inference.model import ICCLD

    model = ICCLD.from_pretrained(arguments.model, weights=arguments.weights)
    export_model(model, arguments.output, kind=kind, num_steps=arguments.num_steps, images=arguments.images)
    return 0


def export_model(model: "ICCLD", output: Path, *, kind: str, num_steps: int = 0, images: Sequence[Path] = ()) -> float:
    """Write `output` once it gives the model's logits; return the largest difference, a share of the largest logit.

    kind: `torch` or `onnx`. images: files on which both are compared, at several sizes. Raises ValueError.
    """
    from iccld.durable import make_folder, replacing
    from iccld.stages.kind import StageKind
    from iccld.stages.table import stage_of

    if type(stage := stage_of(model)).predictor is not StageKind.predictor:
        raise ValueError(f"export: models of {stage.name} predict in a way of their own, which no file holds.")
    model = model.cpu().eval()
    module = _module(model, num_steps)
    trials = [_inputs(model, images, size, with_noise=num_steps > 0) for size in SIZES]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"model.{'onnx' if kind == 'onnx' else 'pt2'}"
        with _refused_in_one_line(model, other=".pt2" if kind == "onnx" else ".onnx"):
            (_write_onnx if kind == "onnx" else _write_torch)(module, trials[0], file)
            worst = _difference(module, _runner(file, kind), trials)
        if not worst <= TOLERANCE:
            raise ValueError(
                f"export: the exported model's logits differ from the model's by {worst:.1e} of the largest; nothing "
                f"is written. Try another --format."
            )
        make_folder(output.parent, within=output.parent)
        with replacing(output) as written, file.open("rb") as read:
            while piece := read.read(1 << 24):
                written.write(piece)
    print(f"{output}: logits within {worst:.1e} of the model's, on {len(SIZES)} sizes", flush=True)
    return worst


@contextlib.contextmanager
def _refused_in_one_line(model: "ICCLD", *, other: str) -> Iterator[None]:
    """Turn errors of torch and onnxruntime into ValueError: some encoders cannot be exported, or not in each format."""
    try:
        yield
    except Exception as error:
        by_runtime = type(error).__module__.startswith("onnxruntime.")  # its errors have no class in common
        if not isinstance(error, RuntimeError) and not by_runtime:
            raise
        if lacks_memory(error):
            raise ValueError("export: memory does not suffice for this model; use a machine that has more.") from error
        cannot = "onnxruntime cannot run" if by_runtime else "torch cannot export"
        why, encoder = str(error).strip().partition("\n")[0][:200], model.encoder.backbone.config.model_type
        raise ValueError(
            f"export: {cannot} this model, whose encoder is a {encoder} ({type(error).__name__}: {why}); try a "
            f"file that ends in {other}."
        ) from error


def _module(model: "ICCLD", num_steps: int) -> "nn.Module":
    """Wrap the model as a module whose inputs are tensors only."""
    from torch import nn

    if num_steps:
        model._trained_denoiser()

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: "Tensor", noise: "Tensor | None" = None) -> "Tensor":
            return self.model(images, noise=noise, num_steps=num_steps)

    return Exported().eval()


def _inputs(
    model: "ICCLD", files: Sequence[Path], size: tuple[int, int, int], *, with_noise: bool
) -> tuple["Tensor", ...]:
    """Return images `(B, 3, H, W)` and, `with_noise`, noise of their latent's shape."""
    import torch
    from torch.nn.functional import interpolate

    from iccld import rng
    from iccld.inference.files import read_image

    batch, height, width = size
    numbers = torch.arange(batch)
    if files:
        read = [torch.from_numpy(read_image(files[i % len(files)])).permute(2, 0, 1)[None] / 255 for i in range(batch)]
        images = torch.cat([interpolate(image, size=(height, width), mode="bilinear") for image in read])
    else:
        coarse = rng.normal((3, 8, 8), seed=0, purpose="export", numbers=numbers, device="cpu").sigmoid()
        images = interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    if not with_noise:
        return (images,)
    shape = model.latent_shape(height, width)
    return images, rng.normal(shape, seed=0, purpose="export noise", numbers=numbers, device="cpu")


def _dynamic(inputs: Sequence["Tensor"]) -> tuple[dict[int, Any], ...]:
    """Describe the free dimensions: batch, and rows and columns in multiples of the coarsest stride.

    Encoders round other sizes differently. The export tells maps of one position from larger ones, so there are two
    of them at least.
    """
    from torch.export import Dim

    batch, rows, columns = Dim("batch", min=1), Dim("rows", min=2), Dim("columns", min=2)
    images = {0: batch, 2: COARSEST_STRIDE * rows, 3: COARSEST_STRIDE * columns}
    times = COARSEST_STRIDE // LATENT_STRIDE
    latent = {0: batch, 2: times * rows, 3: times * columns}
    return (images, latent)[: len(inputs)]


def _write_torch(module: "nn.Module", inputs: tuple["Tensor", ...], file: Path) -> None:
    import torch

    with torch.no_grad():
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=_shapes(inputs))
        except RuntimeError:  # strict tracing is slower, and leaves free what `int(size)` ties (MobileNetV2's padding)
            program = torch.export.export(module, inputs, dynamic_shapes=_shapes(inputs), strict=True)
    torch.export.save(program, str(file))


def _write_onnx(module: "nn.Module", inputs: tuple["Tensor", ...], file: Path) -> None:
    import torch

    with _quiet("torch.onnx._internal.exporter._registration"), torch.no_grad():
        torch.onnx.export(
            module,
            inputs,
            str(file),
            dynamo=True,
            external_data=False,
            input_names=["images", "noise"][: len(inputs)],
            output_names=["logits"],
            dynamic_shapes=_shapes(inputs),
            verbose=False,
        )


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Drop warnings of a logger, such as those about packages that the model does not use, and FutureWarnings."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        found.setLevel(level)


def _shapes(inputs: Sequence["Tensor"]) -> dict[str, Any]:
    return dict(zip(("images", "noise"), _dynamic(inputs), strict=False))


def _runner(file: Path, kind: str) -> Any:
    """Return the exported model as a function of tensors, run as its users would."""
    import torch

    if kind == "torch":
        return torch.export.load(str(file)).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *given: torch.from_numpy(
        session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})[0]
    )


def _difference(module: "nn.Module", exported: Any, trials: Sequence[tuple["Tensor", ...]]) -> float:
    """Return the largest difference of logits, as a share of the largest; NaN where the program gives no numbers.

    Raises ValueError if the model itself gives none.
    """
    import torch

    differences: list[Tensor] = []
    with torch.no_grad():
        for given in trials:
            own, other = module(*given), exported(*given)
            if own.shape != other.shape:
                raise ValueError(
                    f"export: logits {tuple(other.shape)} are not of the model's shape {tuple(own.shape)}."
                )
            if not bool(own.isfinite().all()):
                raise ValueError(
                    "export: the model's own logits are not finite; nothing is written. Use another model."
                )
            differences.append((own - other).abs().max() / own.abs().max().clamp(min=1e-30))
    return float(torch.stack(differences).max())  # unlike Python's, this maximum keeps NaN
