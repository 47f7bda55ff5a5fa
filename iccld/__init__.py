"""Inter-Coder Connected Latent Diffusion for unsupervised domain-adaptive semantic segmentation (arXiv 2412.16859)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iccld.inference.model import ICCLD as ICCLD

__version__ = "0.1.0"
__all__ = ["ICCLD", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `iccld.ICCLD` when it is first asked for: its imports (torch, transformers) take seconds."""
    if name == "ICCLD":
        from iccld.inference.model import ICCLD

        return ICCLD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
