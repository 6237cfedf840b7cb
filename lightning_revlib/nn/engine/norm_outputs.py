"""Normalised inputs are computed again when backward needs them, instead of being held until then.

A pre-norm block computes them first, and needs them last: for the gradient of the weight that reads them. What the
norm has saved for its own gradient, which lives until then anyway, is enough to find them again.
"""

from __future__ import annotations

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


class Norms:
    """The norms of a block in one run of it. `watch` before the run, `forget` after it; `again` gives a tensor back."""

    SMALLEST = 512 * 1024  # bytes of a stream or output below which this takes more time than the bytes are worth

    def __init__(self, block: nn.Module) -> None:
        self.modules = [m for m in _parts(block) if type(m) in FUNCTIONS and "forward" not in m.__dict__]
        self._runs: list[tuple[_Output, Tensor, Tensor, tuple[int, int]]] = []  # with input, output and their versions
        self._forgotten: dict[int, tuple[_Output, torch.Size]] = {}

    @classmethod
    def matter(cls, modules: Sequence[nn.Module], stream: Tensor) -> bool:
        """Whether there are any whose outputs may be large, for streams like this one."""
        return stream.nbytes >= cls.SMALLEST and not FUNCTIONS.keys().isdisjoint(map(type, modules))

    def watch(self) -> Callable[[], None]:
        """Note what the norms compute; what is returned ends that."""
        for m in self.modules:
            m.__dict__["forward"] = partial(self._run, m)
        return self._end

    def _end(self) -> None:
        for m in self.modules:
            m.__dict__.pop("forward", None)

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y = type(module).forward(module, *args, **kwargs)
        if len(args) == 1 and not kwargs and self._is_usual(args[0], y):
            own = module._parameters  # `getattr` of a module is slow
            parameters = [own[name] if name in own else getattr(module, name, None) for name in ("weight", "bias")]
            if all(p is None or (type(p) in (Tensor, nn.Parameter) and not p.is_inference()) for p in parameters):
                versions = args[0]._version, y._version
                self._runs.append((_Output(module, args[0].shape, parameters), args[0], y, versions))
        return y

    def _is_usual(self, x: Any, y: Any) -> bool:
        return (
            type(x) is type(y) is Tensor
            and y.nbytes >= self.SMALLEST
            and x.is_contiguous()
            and y.is_contiguous()
            and torch.is_grad_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None
            and not (x.is_inference() or y.is_inference() or torch.is_autocast_enabled(x.device.type))
        )

    def forget(self, saved: list[Tensor | None]) -> None:
        """Put None in the place of norms' outputs among the saved tensors, where their inputs are there, too."""
        runs, self._runs = self._runs, []
        pointers = [t.data_ptr() for t in saved] if runs else []  # type: ignore[union-attr]
        for output, x, y, versions in runs:
            if (x._version, y._version) != versions or not output.can_be_computed():
                continue
            if not (found := _find(x, saved, pointers)):
                continue
            output.x = found.popitem()[1].view(output.shape)
            for number, t in _find(y, saved, pointers).items():
                saved[number], self._forgotten[number] = None, (output, t.shape)
                output.uses += 1

    def again(self, number: int) -> Tensor | None:
        """What was saved under this number, once."""
        if number not in self._forgotten:
            return None
        output, shape = self._forgotten.pop(number)
        return output.again().view(shape)


def _find(x: Tensor, saved: Sequence[Tensor | None], pointers: Sequence[int]) -> dict[int, Tensor]:
    """Those of the saved tensors, with these pointers, that are x, but for its shape, by their numbers."""
    pointer, found = x.data_ptr(), {}
    for number, t in enumerate(saved):
        if pointers[number] == pointer and t is not None and t.nbytes == x.nbytes and t.dtype is x.dtype:
            if t._version == x._version and t.is_contiguous():
                found[number] = t
    return found


class _Output:
    """A norm's output, which is computed when it is first asked for, and kept while others will ask for it."""

    def __init__(self, module: nn.Module, shape: torch.Size, parameters: Sequence[Tensor | None]) -> None:
        self.module, self.shape, self.parameters = module, shape, parameters
        self.versions = self._versions()
        self.x: Tensor
        self.uses = 0
        self.value: Tensor | None = None

    def can_be_computed(self) -> bool:
        """FSDP takes a parameter's memory away when its module has run."""
        there = all(p is None or p.untyped_storage().nbytes() >= p.nbytes for p in self.parameters)
        return there and self._versions() == self.versions

    def again(self) -> Tensor:
        self.uses -= 1
        value = self._compute() if self.value is None else self.value
        self.value = value if self.uses else None
        return value

    def _compute(self) -> Tensor:
        if self._versions() != self.versions:
            raise RuntimeError(f"a parameter of {self.module} has been modified in place while backward needs it")
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.x.device.type):
            with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
                return self._compute()
        return FUNCTIONS[type(self.module)](self.module, self.x, *self.parameters)

    def _versions(self) -> list[int]:
        return [0 if p is None else p._version for p in self.parameters]


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The modules in a block whose tensors the block's graph saves, if they are not compiled."""
    compiled = block._compiled_call_impl is not None or "_orig_mod" in block._modules
    if not compiled and "treatments" not in block.__dict__:  # `hasattr` of a module takes ten times as long
        yield block
        for m in block._modules.values():
            if m is not None:
                yield from _parts(m)
