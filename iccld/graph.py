"""Autograd's graph: what a tensor was computed from."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def nodes_behind(outputs: Iterable[Tensor]) -> set[Any]:
    """Return all nodes of the graph that `outputs` depend on; those of parameters have a `variable`."""
    pending, seen = [output.grad_fn for output in outputs], set[Any]()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(parent for parent, _ in node.next_functions)
    return seen
