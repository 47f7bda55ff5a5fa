"""Best speed of a device: by its name, or measured."""

import re
import statistics
import time
from collections.abc import Callable

import torch

BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 311.8,
    "L40S": 362.1,
    "A10G": 70.0,
    "A10": 125.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
}
"""Peaks in 10^12 FLOPs a second of dense bf16, by NVIDIA's data sheets; the first name that fits counts."""

ROUNDS = 5


def nominal_flops(device: torch.device, precision: str) -> float:
    """Return FLOPs a second; 0 if the device is not known. `precision`: bf16, or `no` for fp32.

    For fp32 it is half, as for TF32: what torch's convolutions use there, unless told otherwise.
    """
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    tflops = next((tflops for known, tflops in BF16_TFLOPS.items() if re.search(rf"\b{known}\b", name)), 0.0)
    return 1e12 * tflops / (1 if precision == "bf16" else 2)


def measured_flops(device: torch.device, precision: str) -> float:
    """Measure FLOPs a second of a matrix product large enough to keep the device busy."""
    side, dtype = (8192 if device.type == "cuda" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def measured_bandwidth(device: torch.device) -> float:
    """Measure bytes a second, read and written, of a copy within the device's memory."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of some rounds after a first."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait_for(device: torch.device) -> None:
    """Wait until the device has done everything; for measurements, never on the step path."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
