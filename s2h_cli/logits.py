"""Which tensor of what a model returns holds the logits, and which layer makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

#: Names that models give to their logits, in the order in which they are looked for.
NAMES = ("logits", "out", "output", "outputs", "pred", "preds", "prediction", "predictions")

Path = tuple[str | int, ...]


def parts_of(output: Any) -> Iterator[tuple[str | int, Any]]:
    """The direct parts of a dict, a dataclass, a named tuple, a tuple or a list, with their keys."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output)
    elif isinstance(output, (tuple, list)):
        yield from enumerate(output)


def tensors_in(output: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """All tensors in a nested output, with the keys that lead to them."""
    if isinstance(output, torch.Tensor):
        yield path, output
    for key, part in parts_of(output):
        yield from tensors_in(part, (*path, key))


def find_logits(output: Any) -> Path | None:
    """The keys that lead to the logits (N, classes) in what a model returns; None where no tensor, or more than one, can be meant.

    A tensor of probabilities beside the logits that they come from does not count.
    """
    found = {path: tensor for path, tensor in tensors_in(output) if tensor.ndim == 2 and tensor.is_floating_point()}
    for name in NAMES:
        named = [path for path in found if path and path[-1] == name]
        if len(named) == 1:
            return named[0]
    logits = [path for path, tensor in found.items()
              if not any(other is not tensor and _probabilities_of(tensor, other) for other in found.values())]
    return logits[0] if len(logits) == 1 else None


def _probabilities_of(tensor: torch.Tensor, logits: torch.Tensor) -> bool:
    return tensor.shape == logits.shape and any(
        torch.allclose(tensor, function(logits), atol=1e-5) for function in (lambda x: x.softmax(1), lambda x: x.log_softmax(1), torch.sigmoid))


class PickLogits:
    """A forward hook of a model: of what it returns, only the logits go on. What has no such part stays as it is."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        found = output
        for key in self.path:
            found = dict(parts_of(found)).get(key)
        return output if found is None else found


def shown(path: Path) -> str:
    """Keys as Python writes them: `logits[0]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".") or "the output"


# ---------------------------------------------------------------------------------------------------------------------
# The head


def is_head(module: nn.Module, name: str, images: torch.Tensor) -> bool:
    """Whether a layer's output, one value for each class, goes straight to the model's: shifted, scaled or averaged over positions, or
    through a (log) softmax, but through no other activation, which would bound the logits.

    Args:
        module: returns (N, classes), in eval mode.
        name: of an `nn.Linear` or a 1 x 1 `nn.Conv2d` with as many outputs.
        images: (N, C, H, W).
    """
    layer = module.get_submodule(name)
    channels = layer.weight.shape[0]
    values = 10 * torch.randn(channels, generator=torch.Generator().manual_seed(0))

    def output(filled: torch.Tensor) -> torch.Tensor:
        def fill(layer: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            return filled.view(-1, *[1] * (out.ndim - 2)).expand_as(out) if isinstance(layer, nn.Conv2d) else filled.expand_as(out)

        hook = layer.register_forward_hook(fill)
        try:
            with torch.no_grad():
                return module(images)[0].float()
        finally:
            hook.remove()

    zero, positive, negative = (output(sign * values) for sign in (0, 1, -1))
    if zero.shape != values.shape:
        return False
    if torch.allclose(positive, values.softmax(0), atol=1e-5) or torch.allclose(positive, values.log_softmax(0), atol=1e-4):
        return True
    scale = float((positive - zero) @ values / (values @ values))
    near = 1e-4 * float(values.abs().max()) * abs(scale) + 1e-6
    return scale > 1e-6 and all(torch.allclose(got - zero, sign * scale * values, atol=near) for sign, got in ((1, positive), (-1, negative)))
