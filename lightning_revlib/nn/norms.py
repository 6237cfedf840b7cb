"""Normalised inputs are computed again when backward needs them, instead of being held until then.

A pre-norm block computes them first, and needs them last: for the gradient of the weight that reads them. What the
norm has saved for its own gradient, which lives until then anyway, is enough to find them again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS: dict[type, Callable[[Any, Tensor, Any, Any], Tensor]] = {
    nn.LayerNorm: lambda m, x, weight, bias: F.layer_norm(x, m.normalized_shape, weight, bias, m.eps),
    nn.RMSNorm: lambda m, x, weight, bias: F.rms_norm(x, m.normalized_shape, weight, m.eps),
    nn.GroupNorm: lambda m, x, weight, bias: F.group_norm(x, m.num_groups, weight, bias, m.eps),
}


class _Place:
    """Where a tensor is, without keeping it alive, and how often it had been changed."""

    def __init__(self, t: Tensor) -> None:
        self.pointer, self.version, self.nbytes = t.data_ptr(), t._version, t.nbytes
        self.storage, self.dense = weakref.ref(t.untyped_storage()), t.is_contiguous()

    def holds(self, t: Tensor) -> bool:
        """Whether the tensor is the same, but for its shape."""
        return (
            self.pointer == t.data_ptr()
            and self.nbytes == t.nbytes
            and self.version == t._version
            and self.storage() is t.untyped_storage()
            and self.dense
            and t.is_contiguous()
        )


class Norms:
    """The norms of a block in one run of it. `watch` before the run, `forget` after it; `again` gives a tensor back."""

    SMALLEST = 256 * 1024  # bytes of a stream or output below which this takes more time than the bytes are worth

    def __init__(self, block: nn.Module) -> None:
        self.modules = [m for m in _parts(block) if type(m) in FUNCTIONS and "forward" not in m.__dict__]
        self._runs: list[tuple[nn.Module, torch.Size, _Place, _Place]] = []
        self._forgotten: dict[int, tuple[_Output, torch.Size]] = {}

    def watch(self) -> Callable[[], None]:
        """Note what the norms compute; what is returned ends that."""
        for m in self.modules:
            m.__dict__["forward"] = partial(self._run, m)
        return self._end

    def _end(self) -> None:
        for m in self.modules:
            m.__dict__.pop("forward", None)

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        y = type(module).forward(module, x)
        if type(x) is type(y) is Tensor and y.nbytes >= self.SMALLEST and not torch.is_autocast_enabled(x.device.type):
            self._runs.append((module, x.shape, _Place(x), _Place(y)))
        return y

    def forget(self, saved: list[Tensor | None]) -> None:
        """Put None in the place of norms' outputs among the saved tensors, where their inputs are there, too."""
        for module, shape, x, y in self._runs:
            source = next((t for t in saved if t is not None and x.holds(t)), None)
            parameters = [module._parameters.get(name) for name in ("weight", "bias")]
            if source is None or not all(map(_is_there, parameters)):
                continue
            output = _Output(module, source.view(shape), [p if p is None else p.detach() for p in parameters])
            for number, t in enumerate(saved):
                if t is not None and y.holds(t):
                    saved[number], self._forgotten[number] = None, (output, t.shape)
                    output.uses += 1
        self._runs = []

    def again(self, number: int) -> Tensor | None:
        """What was saved under this number, once."""
        if number not in self._forgotten:
            return None
        output, shape = self._forgotten.pop(number)
        return output.again().view(shape)


class _Output:
    """A norm's output, which is computed when it is first asked for, and kept while others will ask for it."""

    def __init__(self, module: nn.Module, x: Tensor, parameters: Sequence[Tensor | None]) -> None:
        self.compute = partial(FUNCTIONS[type(module)], module, x, *parameters)
        self.uses = 0
        self.value: Tensor | None = None

    def again(self) -> Tensor:
        self.uses -= 1
        value = self.compute() if self.value is None else self.value
        self.value = value if self.uses else None
        return value


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The modules in a block whose tensors the block's graph saves, if they are not compiled."""
    if block._compiled_call_impl is None and not hasattr(block, "_orig_mod") and not hasattr(block, "treatments"):
        yield block
        for m in block._modules.values():
            if m is not None:
                yield from _parts(m)


def _is_there(parameter: Tensor | None) -> bool:
    """FSDP takes a parameter's memory away when its module has run."""
    return parameter is None or (
        type(parameter) in (Tensor, nn.Parameter) and parameter.untyped_storage().nbytes() >= parameter.nbytes
    )
