"""Compilation by torch.compile of what a step calls: one graph a shape, and none after warm-up."""

import os
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from iccld.runtime.settings import Compile

# All blocks share one function's cache, and what does not fit into it silently runs uncompiled.
GRAPHS_PER_FUNCTION = 64
BACKEND = "inductor"


def lacks_for_compiling(device_type: str) -> str:
    """Name what torch.compile needs on devices of a type and this machine lacks; "" if it lacks nothing."""
    if device_type != "cuda":
        name = os.environ.get("CXX") or "g++"
        return "" if shutil.which(name) else f"{name} is not on PATH (install g++, or set CXX)"
    lacks = [] if find_spec("triton") else ["triton is not installed (pip install triton)"]
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, names)):  # Triton builds the functions that start its kernels
        lacks.append(f"{' or '.join(names)} is not on PATH (install gcc, or set CC)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacks.append("Python.h is missing (install python3-dev)")
    return " and ".join(lacks)


def choose_compile(wanted: Compile, device_type: str, *, lacks: str) -> Compile:
    """Return what to compile: nothing where `auto` cannot. Raises ValueError for another choice that cannot work."""
    how = wanted.on(device_type)
    if how is Compile.none or not lacks:
        return how
    if wanted is Compile.auto:
        return Compile.none
    raise ValueError(f"engine.compile={wanted.value}: torch.compile cannot work: {lacks}; or set engine.compile=none.")


def compile_in_place(networks: Iterable[nn.Module], how: Compile) -> None:
    """Compile each network, or the `forward` of its blocks; shapes are constants, so each set of them makes a graph.

    Code that sees other sizes (scoring) runs eagerly: `iccld.eager.without_compiled_code`.
    """
    if how is Compile.none:
        return
    import torch._dynamo  # importing it takes seconds
    import torch._inductor.config

    # Inductor reads this from the environment alone, when it is imported.
    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    torch._dynamo.config.recompile_limit = GRAPHS_PER_FUNCTION
    if how is Compile.whole:
        for network in networks:
            network.compile(dynamic=False, backend=BACKEND)
        return
    compiled: dict[type, Any] = {}
    for block in (block for network in networks for block in repeated_blocks(network)):
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=False, backend=BACKEND)
        # The hooks of a backbone's layers stay outside of the graph. A deep copy of a block binds the method to itself.
        block.forward = MethodType(compiled[kind], block)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network: the innermost members of its module lists and sequences.

    A member without parts is a layer of torch itself, which is one kernel already.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    members = [member for members in lists for member in members if any(member.children())]
    layers = {member: None for member in members if not isinstance(member, nn.ModuleList)}
    return [layer for layer in layers if not any(part in layers for part in layer.modules() if part is not layer)]
