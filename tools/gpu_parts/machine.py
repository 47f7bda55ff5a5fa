"""Part limits: versions, and what the device does at best."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch

from iccld.extras import version_of
from iccld.runtime.measure.peaks import measured_bandwidth, measured_flops, nominal_flops

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "diffusers", "kornia", "xformers", "numpy")


def limits(folder: Path) -> dict[str, Any]:
    """Versions, and 10^12 operations and bytes a second of plain products and copies."""
    del folder
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rates = {f"matmul_{name}": measured_flops(device, name) / 1e12 for name in ("bf16", "fp32")}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        rates["matmul_tf32"] = measured_flops(device, "fp32") / 1e12
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "versions": {package: version_of(package, absent="not installed") for package in PACKAGES},
        "tflops": rates,
        "nominal_tflops": nominal_flops(device, "bf16") / 1e12,
        "copy_tb_per_s": measured_bandwidth(device) / 1e12,
    }
