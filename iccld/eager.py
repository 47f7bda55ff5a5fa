"""Execution without compiled code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """Run a block, or as a decorator a function, without the code that torch.compile made.

    A process in which nothing was compiled does not import the compiler, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
