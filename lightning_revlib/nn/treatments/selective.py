"""Selective checkpointing that keeps what is dear to compute, and is right where blocks change it in place.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` hands out what it has kept as it is by then: gradients are
silently wrong if the block has changed it. Here what is kept parts from what is about to be changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.state.parameters import version

if TYPE_CHECKING:
    from lightning_revlib.nn.treatments.checkpoint import Checkpoint

# What `TorchDispatchMode` does when it is entered and left, as it sees it.
push_mode, pop_mode = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack
get_mode, count_modes = torch._C._get_dispatch_stack_at, torch._C._len_torch_dispatch_stack


# Modules that do nothing of that kind, and change no tensor but their own: a mode need not look at what they do.
LIGHT = frozenset((
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.Dropout, nn.GELU, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Softmax, nn.Tanh,
))  # fmt: skip


def keep_heavy(call: Checkpoint) -> tuple[Any, Any]:
    """Contexts for a first and a second run: the first keeps matrix products, convolutions, attention, for the second.

    The second ends with the last that the call has saved in the first; what has been put out later is not kept. A
    second run of a second backward finds nothing kept, and computes all.
    """
    kept: dict[int, Any] = {}
    light = [m for m in call.settings.modules if type(m) in LIGHT and not m.__dict__.get("inplace")]
    return _Keep(light, kept, call.saved), _Reuse(light, kept)


class _Mode(TorchDispatchMode):
    """Counts what is heavy, and does not see what light modules do."""

    def __init__(self, light: Sequence[nn.Module], kept: dict[int, Any]) -> None:
        super().__init__()
        self.light, self.kept = light, kept

    def __enter__(self) -> Any:
        self.count = 0
        for m in self.light:
            m.__dict__.setdefault("forward", partial(self._unseen, m))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for m in self.light:
            forward = m.__dict__.get("forward")
            if type(forward) is partial and getattr(forward.func, "__self__", None) is self:
                del m.__dict__["forward"]

    def _unseen(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count = count_modes()
        if not count or get_mode(count - 1) is not self:  # another has been entered since, or this is another thread
            return type(module).forward(module, *args, **kwargs)
        pop_mode(None)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            push_mode(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would, by a wrapper that takes as long as the rest; see below


class _Keep(_Mode):
    def __init__(self, light: Sequence[nn.Module], kept: dict[int, Any], saved: Sequence[int]) -> None:
        super().__init__(light, kept)
        self.saved = saved
        self.before: dict[int, int] = {}  # how much was saved before an output, its operation's inputs included
        self.owners: dict[int, int] = {}  # by storage, the output in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        heavy, writes = traits(func)
        if writes and self.owners:
            for t in written(func, args, kwargs):
                number = self.owners.pop(t.untyped_storage()._cdata, None)
                if number is not None:
                    self.kept[number] = tree_map_only(Tensor, torch.clone, self.kept[number])
        out = func(*args, **kwargs)
        if heavy:
            number, self.count = self.count, self.count + 1
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # counts changes
                self.kept[number] = out.detach() if type(out) is Tensor else tree_map_only(Tensor, torch.detach, out)
            self.before[number] = len(self.saved)
            self.owners.update((t.untyped_storage()._cdata, number) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for number, count in self.before.items():
            if count == len(self.saved):
                del self.kept[number]
            else:
                self.kept[number] = self.kept[number], versions(self.kept[number])


class _Reuse(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if traits(func)[0]:
            out, kept = self.kept.pop(self.count, (None, None))
            self.count += 1
            if kept is not None and versions(out) == kept:  # else it has been changed since
                return out
        return func(*args, **(kwargs or {}))


def versions(out: Any) -> list[int]:
    """Those of an operation's outputs."""
    return [version(t) for t in tree_leaves(out) if isinstance(t, Tensor)]


@lru_cache(maxsize=4096)
def traits(func: Any) -> tuple[bool, Sequence[tuple[int, str]]]:
    """Whether PyTorch counts FLOPs for it, or should, and which arguments it changes, by place and name.

    Attention's kernel on the CPU is not in PyTorch's list. What changes an argument has to be done again: it does not
    count as heavy.
    """
    schema = func._schema
    heavy = func._overloadpacket in flop_registry or "scaled_dot_product" in schema.name
    places = enumerate(schema.arguments)
    writes = [(i, a.name) for i, a in places if a.alias_info is not None and a.alias_info.is_write]
    return heavy and not writes, writes


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for index, name in traits(func)[1]:
        value = args[index] if index < len(args) else kwargs.get(name)
        yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


for mode in (_Keep, _Reuse):
    skip_code(mode.__torch_dispatch__.__code__)  # not to be compiled
