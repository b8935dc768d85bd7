"""A GPU for tests on machines without one: tensors that say that they are on another device, and compute on the CPU.

As on a GPU, a call that mixes the device with the CPU is an error, and what makes the processor wait for the device
is counted.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

#: What it says; of those that torch knows, one that no build of torch has and that autograd needs no driver for.
DEVICE = torch.device("lazy:0")
aten = torch.ops.aten
#: What gives the processor something that the device has computed: it waits.
WAITS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.repeat_interleave,
)
#: These take index tensors, or numbers as tensors, from the CPU too.
MIX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_, aten._foreach_copy_)


class Pretended(torch.Tensor):
    """A tensor on `DEVICE`; `inner` is the one that computes."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # in a file that is loaded with map_location="cpu"
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the mode")


class Machine(TorchDispatchMode):
    """While it is on, tensors can be made on `DEVICE` and moved there.

    Attributes:
        waits: how often the processor waited for the device, by the line of s2h.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet, tensors = (
            func.overloadpacket,
            [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)],
        )
        here = [isinstance(tensor, Pretended) for tensor in tensors]
        to = kwargs.get("device")
        on_device = any(here) if to is None else torch.device(to).type == DEVICE.type
        moves = packet in (aten._to_copy, aten.copy_) and len({*here, on_device}) > 1 and str(to) != "meta"
        if any(here) and not all(here) and packet not in MIX:
            strangers = [tuple(tensor.shape) for tensor, own in zip(tensors, here) if not own and tensor.dim()]
            assert not strangers, f"{func} mixes the device with CPU tensors of shapes {strangers}"
        if moves and not kwargs.get("non_blocking") or any(here) and packet in WAITS:
            self._count(func)
        if to is not None:
            kwargs = {**kwargs, "device": torch.device(to) if not on_device else torch.device("cpu")}
        inner = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if not on_device:
            return inner
        return return_and_correct_aliasing(
            func,
            args,
            kwargs,
            tree_map(lambda value: Pretended(value) if isinstance(value, torch.Tensor) else value, inner),
        )

    def _count(self, func) -> None:
        frames = [frame for frame in traceback.extract_stack() if "s2h_cli" in Path(frame.filename).parts]
        self.waits[f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else str(func)] += 1


def _inside(value):
    return value.inner if isinstance(value, Pretended) else value
