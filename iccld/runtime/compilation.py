"""torch.compile of what a step calls: one graph a shape, and none after warm-up."""

from collections.abc import Iterable

from torch import nn

# Where an engine shards layer by layer, each is a graph of its own; all layers of a class share one function's cache,
# and what does not fit into it silently runs uncompiled.
GRAPHS_PER_FUNCTION = 64
BACKEND = "inductor"


def compile_in_place(modules: Iterable[nn.Module]) -> None:
    """Compile each module's `__call__`; shapes are constants, so that no graph is made for sizes that may come.

    Where other sizes come (scoring), run eagerly: `torch.compiler.set_stance("force_eager")`.
    """
    import torch._dynamo  # takes seconds; only where something is compiled

    torch._dynamo.config.recompile_limit = GRAPHS_PER_FUNCTION
    for module in modules:
        module.compile(dynamic=False, backend=BACKEND)
