"""Extras of the package, and the libraries that each of them installs."""

from importlib.metadata import PackageNotFoundError, version

EXTRA_OF = {
    "argcomplete": "completion",
    "accelerate": "train",
    "aiohttp": "train",
    "deepspeed": "train",
    "fsspec": "train",
    "hydra": "train",
    "kornia": "train",
    "matplotlib": "train",
    "omegaconf": "train",
    "tenacity": "train",
    "tensorboard": "tensorboard",
    "wandb": "train",
    "webdataset": "train",
    "xformers": "train",
    "hydra_plugins": "slurm",
    "s3fs": "s3",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "av": "video",
}
"""The extra that brings a library, by the name under which it is imported."""


def version_of(package: str, *, absent: str = "") -> str:
    """Return a package's installed version; `absent` if it has none, as one whose metadata are missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return absent


def remedy(error: ImportError) -> str:
    """Say what a command needs and how to install it, as "needs hydra; pip install 'iccld[train]'".

    Raises the error again if no extra brings what is missing: then it is a fault of the program.
    """
    library = (error.name or "").partition(".")[0]
    if library not in EXTRA_OF or not isinstance(error, ModuleNotFoundError):
        raise error
    return f"needs {library}; pip install 'iccld[{EXTRA_OF[library]}]'"
