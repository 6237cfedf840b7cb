"""Fake tensors, which have shapes and no memory, in place of real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Fakes:
    """Makes fake tensors inside a FakeTensorMode: of the same shape, strides and dtype, one for each original.

    Tensors that share a storage have fakes that do. A subclass that wraps tensors, such as DTensor, wraps fakes then.

    Args:
        device: of all fakes; without, that of the original, or the CPU if that is on the meta device.

    Raises TypeError, when called, for a tensor that is not strided, such as a sparse one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose id no other tensor gets then
        self._storages: dict[int, Tensor] = {}

    def __call__(self, tensor: Any) -> Any:
        if id(tensor) not in self._made:
            new = self._of_fakes(tensor) if hasattr(tensor, "__tensor_flatten__") else self._view(tensor)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            self._made[id(tensor)] = tensor, new
        return self._made[id(tensor)][1]

    def _of_fakes(self, tensor: Any) -> Tensor:
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        parts = {name: self(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())

    def _view(self, tensor: Tensor) -> Tensor:
        """Return a fake of the same shape, strides and offset in its storage."""
        if tensor.layout is not torch.strided:
            raise TypeError(f"simulate=True: there are no simulated tensors of layout {tensor.layout}; count real ones")
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            device = self.device or ("cpu" if tensor.is_meta else tensor.device)
            self._storages[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
        size = storage.nbytes() // tensor.itemsize * tensor.itemsize
        numbers = self._storages[storage._cdata][:size].view(tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()  # no view of another
