"""Objects with many tensors from one process to another, as one tensor.

Each tensor that a worker sends costs its receiver an open file and a mapping of its own; a few
batches of many photos would come to the limit on open files.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """A pickled object with the bytes of its tensors beside it. layout: of each dtype, shape and
    place in `data`, uint8."""

    pickled: bytes
    layout: list[tuple[torch.dtype, torch.Size, int]]
    data: Tensor


def pack(value: Any) -> Packed:
    """`value`, with a copy of all tensors in it, which lie on the CPU."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    data = torch.empty(pickler.size, dtype=torch.uint8)
    layout = []
    for tensor, at in pickler.tensors:
        layout.append((tensor.dtype, tensor.shape, at))
        _view(data, *layout[-1]).copy_(tensor)
    return Packed(file.getvalue(), layout, data)


def unpack(packed: Packed) -> Any:
    """What was packed; its tensors share the memory of `packed.data`."""
    return _Unpickler(packed).load()


def _view(data: Tensor, dtype: torch.dtype, shape: torch.Size, at: int) -> Tensor:
    return data[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them with the places they will have."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[Tensor, int]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append((value, self.size))
        self.size += -(-value.numel() * value.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.pickled))
        self._packed = packed

    def persistent_load(self, number: int) -> Tensor:
        return _view(self._packed.data, *self._packed.layout[number])
