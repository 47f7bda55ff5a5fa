"""Compilation by torch.compile of what a step calls: one graph a shape, and none after warm-up."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from iccld.runtime.settings import Compile

# All blocks share one function's cache, and what does not fit into it silently runs uncompiled.
GRAPHS_PER_FUNCTION = 64
BACKEND = "inductor"


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
