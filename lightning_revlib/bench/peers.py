"""Other libraries with the interface of `CoupledSequential`, each set up as its own documentation asks.

A part of a stack is a run of blocks that one module of the peer can hold. Parts follow each other as in
`nn.Sequential`. Each peer is imported when it is used, since any of them may be missing. All adapters are in one file,
where they can be compared.
"""

from __future__ import annotations

import copy
import random
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lightning_revlib.nn import CoupledSequential


class Inexpressible(Exception):
    """Raised if a peer cannot express an option or a condition."""


def _is_invertible(block: nn.Module) -> bool:
    return hasattr(block, "inverse")


def paired(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return runs of even length, for peers that couple two blocks: an odd run gets a copy of its last block."""
    out: list[nn.Module] = []
    for invertible, group in groupby(blocks, _is_invertible):
        run = list(group)
        out += run if invertible or len(run) % 2 == 0 else [*run, copy.deepcopy(run[-1])]
    return out


def paired_reference(*blocks: nn.Module, **options: Any) -> nn.Module:
    """Build the reference of peers that couple two blocks, by ordinary autograd.

    y1 = x1 + F(x2), y2 = x2 + G(y1) are two steps of `CoupledSequential`.
    """
    return CoupledSequential(*paired(blocks), **options)


class Halves(nn.Module):
    """An invertible step that applies `module` to each half."""

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__()
        self.module, self.dim = module, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(half) for half in x.chunk(2, self.dim)], self.dim)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat([self.module.inverse(half) for half in y.chunk(2, self.dim)], self.dim)  # type: ignore[operator]


class Peer(nn.Module):
    """A peer's stack, whose parameters have the order of the blocks, as in `CoupledSequential`."""

    OPTIONS: ClassVar[set[str]] = set()  # the peer's own, beside split_dim and treatments

    def __init__(
        self,
        *blocks: nn.Module,
        split_dim: int | None = 1,
        store_last: int = 0,
        treatments: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := set(options) - self.OPTIONS:
            raise Inexpressible(f"no option like {', '.join(unknown)}")
        self.blocks, self.split_dim = list(blocks), split_dim  # plain lists, since `parts` registers the modules
        treatments = treatments or ["reversible"] * (len(blocks) - store_last) + ["store"] * store_last
        kinds = ["invertible" if _is_invertible(b) else t for b, t in zip(blocks, treatments, strict=True)]
        self.parts = nn.ModuleList(self.build(kinds, blocks, **options))

    def build(self, kinds: Sequence[str], blocks: Sequence[nn.Module], **options: Any) -> list[nn.Module]:
        """Return the parts; `kinds` are the blocks' treatments, or "invertible"."""
        parts, done = [], 0
        for kind, group in groupby(zip(kinds, blocks, strict=True), lambda pair: pair[0]):
            run = [block for _, block in group]
            if kind == "invertible":
                parts += [self.invertible(block) for block in run]
            else:
                parts.append(self.part(kind, run, done, **options))
                done += len(run)
        return parts

    def part(self, kind: str, blocks: list[nn.Module], done: int, **options: Any) -> nn.Module:
        """Return the peer's module for `blocks`, which follow `done` other blocks."""
        raise NotImplementedError

    def invertible(self, block: nn.Module) -> nn.Module:
        """Return the module for an invertible step, which ordinary autograd runs between the peer's modules."""
        assert self.split_dim is not None
        return Halves(block, self.split_dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for part in self.parts:
            x = part(x, *args, **kwargs)
        return x

    def __getitem__(self, index: int | slice) -> nn.Module:
        return nn.ModuleList(self.blocks[index]) if isinstance(index, slice) else self.blocks[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)


class RevLib(Peer):
    """RevLib's stack."""

    OPTIONS: ClassVar[set[str]] = {"coupling_forward", "coupling_inverse"}
    mode = "autograd_function"

    def part(  # type: ignore[override]
        self,
        kind: str,
        blocks: list[nn.Module],
        done: int,
        coupling_forward: list[Callable[..., Tensor]] | None = None,
        coupling_inverse: list[Callable[..., Tensor]] | None = None,
    ) -> nn.Module:
        import revlib

        mode = {"reversible": self.mode, "checkpoint": "checkpoint", "store": "no_savings"}[kind]
        pair = [  # couplings cycle over the whole stack, not over each part
            functions and functions[done % len(functions) :] + functions[: done % len(functions)]
            for functions in (coupling_forward, coupling_inverse)
        ]
        return revlib.ReversibleSequential(
            *blocks,
            split_dim=self.split_dim,
            memory_mode=revlib.MemoryModes[mode],
            coupling_forward=pair[0],
            coupling_inverse=pair[1],
        )

    def forward(
        self, x: Tensor, *args: Any, layerwise: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] = (), **kwargs: Any
    ) -> Tensor:
        if layerwise:
            kwargs["layerwise_args_kwargs"] = [(list(own), dict(named)) for own, named in layerwise]
        return super().forward(x, *args, **kwargs)


class RevLibGraph(RevLib):
    """RevLib's stack in the mode that rebuilds activations inside autograd's graph."""

    mode = "autograd_graph"


class Pairs(Peer):
    """Base of peers that couple two blocks at a time and halve their input."""

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__(*paired(blocks), **options)

    def part(self, kind: str, blocks: list[nn.Module], done: int, **options: Any) -> nn.Module:
        if len(blocks) % 2 or self.split_dim is None:
            raise Inexpressible("two blocks are treated as one, and halve their input")
        return self.pairs(kind, list(zip(blocks[::2], blocks[1::2], strict=True)), self.split_dim)

    @abstractmethod
    def pairs(self, kind: str, pairs: list[tuple[nn.Module, nn.Module]], dim: int) -> nn.Module:
        """Return the peer's module for pairs of blocks."""


class MemCNN(Pairs):
    """MemCNN's wrappers, with as many backward passes as any condition needs and the generator's state preserved.

    For one backward of blocks that draw no random numbers, `passes=1` and `preserve=False` are faster. An input that is
    a leaf is copied, as if another layer came first, since MemCNN frees it and doubles its gradient.
    """

    passes, preserve = 3, True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone() if x.is_leaf else x)

    def pairs(self, kind: str, pairs: list[tuple[nn.Module, nn.Module]], dim: int) -> nn.Module:
        import memcnn

        couplings = [memcnn.AdditiveCoupling(Fm=f, Gm=g, split_dim=dim) for f, g in pairs]
        for coupling in couplings:
            coupling._modules["Gm"] = coupling._modules.pop("Gm")  # MemCNN registers G before F
        return nn.Sequential(*[self._wrapper(c, keep=kind == "checkpoint", disable=kind == "store") for c in couplings])

    def invertible(self, block: nn.Module) -> nn.Module:
        return self._wrapper(super().invertible(block))

    def _wrapper(self, module: nn.Module, keep: bool = False, disable: bool = False) -> nn.Module:
        import memcnn

        return memcnn.InvertibleModuleWrapper(
            module,
            keep_input=keep,
            num_bwd_passes=self.passes,
            disable=disable,
            preserve_rng_state=self.preserve,
        )


class RevTorch(Pairs):
    """RevTorch's sequence.

    `careful` fixes seeds for blocks that draw random numbers, and keeps variables for further backwards.
    """

    careful = True

    def pairs(self, kind: str, pairs: list[tuple[nn.Module, nn.Module]], dim: int) -> nn.Module:
        import revtorch

        if kind != "reversible":
            raise Inexpressible("a sequence is run in one way")
        blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=dim, fix_random_seed=self.careful) for f, g in pairs]
        return revtorch.ReversibleSequence(nn.ModuleList(blocks), eagerly_discard_variables=not self.careful)


class ReformerPytorch(Pairs):
    """The sequence of pairs of reformer-pytorch, whose streams are halves of the third dimension."""

    def pairs(self, kind: str, pairs: list[tuple[nn.Module, nn.Module]], dim: int) -> nn.Module:
        from reformer_pytorch.reversible import ReversibleSequence

        if kind != "reversible":
            raise Inexpressible("a sequence is run in one way")
        if dim != 2:
            raise Inexpressible("streams are halves of dimension 2")
        return ReversibleSequence(nn.ModuleList([nn.ModuleList(pair) for pair in pairs]))


class Seeded(nn.Module):
    """The function that RevTorch computes, by ordinary autograd, with a new seed before each block."""

    def __init__(self, *blocks: nn.Module, dim: int) -> None:
        super().__init__()
        self.blocks, self.dim = nn.ModuleList(blocks), dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.dim)
        for block in self.blocks:
            torch.manual_seed(random.randint(0, sys.maxsize))
            a, b = b, a + block(b)
        return torch.cat((a, b), self.dim)


class SeededReference(Pairs):
    """The reference of RevTorch."""

    def pairs(self, kind: str, pairs: list[tuple[nn.Module, nn.Module]], dim: int) -> nn.Module:
        return Seeded(*[block for pair in pairs for block in pair], dim=dim)


class MomentumNet(Peer):
    """momentumnet's network in its mode that saves memory; the velocity starts at zero."""

    OPTIONS: ClassVar[set[str]] = {"coupling"}

    def build(  # type: ignore[override]
        self, kinds: Sequence[str], blocks: Sequence[nn.Module], coupling: Mapping[str, Any] = MappingProxyType({})
    ) -> list[nn.Module]:
        import momentumnet

        if set(kinds) not in ({"reversible"}, {"store"}):
            raise Inexpressible("a net is reversible or stored, and passes no velocity on to the next")
        return [momentumnet.MomentumNet(blocks, gamma=coupling["gamma"], use_backprop=kinds[0] == "store")]


class CheckpointedBlock(nn.Module):
    """A block under `torch.utils.checkpoint`."""

    def __init__(self, block: nn.Module, context_fn: Callable[[], Any]) -> None:
        super().__init__()
        self.block, self.context_fn = block, context_fn

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, x, *args, use_reentrant=False, context_fn=self.context_fn, **kwargs)


class Checkpointed(Peer):
    """The coupling by ordinary autograd, with each block under `torch.utils.checkpoint`."""

    OPTIONS: ClassVar[set[str]] = {"context_fn"}

    def build(  # type: ignore[override]
        self, kinds: Sequence[str], blocks: Sequence[nn.Module], context_fn: Callable[[], Any] = noop_context_fn
    ) -> list[nn.Module]:
        modules = [
            block if kind in ("store", "invertible") else CheckpointedBlock(block, context_fn)
            for kind, block in zip(kinds, blocks, strict=True)
        ]
        return [CoupledSequential(*modules, split_dim=self.split_dim)]
