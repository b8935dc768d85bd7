"""The batch size of a model that is being exported: it stays free, or the line that fixes it is known.

While `torch.export` runs a model, the size of its batch is a symbol. `int(size)` and `len(x)` must return a true integer in
Python, so that code such as `int(windows.shape[0] / n)` fixes the graph at the one batch size that it was exported with.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, Callable, Iterator

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class _IsInt(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.int)


class _Int(builtins.int, metaclass=_IsInt):
    """`int` that leaves symbols symbols."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        symbol = len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat))
        return torch.sym_int(args[0]) if symbol else builtins.int(*args, **kwargs)


def _len(value: Any) -> Any:
    """`len` that takes the size of a tensor from its shape, where it may be a symbol."""
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else builtins.len(value)


@contextmanager
def symbolic_int(model: nn.Module) -> Iterator[None]:
    """A block in which `int` and `len` keep symbols, in the files that define a model and those of the functions they import."""
    names = {"int": _Int, "len": _len}
    found = [(module, name) for module in _own_files(model) for name in names if name not in vars(module)]
    for module, name in found:
        setattr(module, name, names[name])
    try:
        yield
    finally:
        for module, name in found:
            delattr(module, name)


def _own_files(model: nn.Module) -> list[ModuleType]:
    first = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    first = {name for name in first if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins")}
    imported = {value.__module__ for name in first for value in vars(sys.modules[name]).values() if isinstance(value, FunctionType)}
    return [sys.modules[name] for name in sorted(first | imported)
            if name and name in sys.modules and name.partition(".")[0] not in ("torch", "builtins")]


@contextmanager
def fixed_at(line: Callable[[list[traceback.FrameSummary]], str]) -> Iterator[list[str]]:
    """Collects the lines of the model that give a symbol a number meanwhile.

    Args:
        line: the text for the stack from here on.
    """
    found: list[str] = []
    depth = len(traceback.extract_stack())
    original = ShapeEnv._set_replacement

    def set_replacement(self: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if not target.free_symbols:
            found.append(line(traceback.extract_stack()[depth:]))
        original(self, symbol, target, message)

    ShapeEnv._set_replacement = set_replacement
    try:
        yield found
    finally:
        ShapeEnv._set_replacement = original
