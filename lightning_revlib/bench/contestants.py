"""Who takes part: ways to execute a `CoupledSequential`, each a function from the stack to a module.

The function may change the stack it is given, and raises `Inexpressible` where its library has no way to
run it. Everyone is set up for speed: random states are preserved only where blocks draw, and drift, which no peer
looks at, is not looked at.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.flop_counter import flop_registry

from lightning_revlib.bench import peers
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.nn import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.coupling.standard import Additive, Momentum
from lightning_revlib.nn.stacks.build import build_steps
from lightning_revlib.nn.stacks.options import MemoryBudget
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.prefetch import has_streams


@dataclass(frozen=True)
class Contestant:
    """`build(stack, draws)` returns what is run; `draws` says whether blocks draw random numbers.

    `budget`, in bytes or as a fraction, is for all stacks of a model together.
    """

    name: str
    build: Callable[[CoupledSequential, bool], nn.Module]
    package: str = "torch"
    reversible: bool = False  # holds nothing per block
    budget: MemoryBudget | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        if self.package == "lightning_revlib":
            from lightning_revlib import __version__

            return __version__
        return importlib.metadata.version(self.package) if self.installed else "not installed"


class Checkpointed(CoupledSequential):
    """`torch.utils.checkpoint` round runs of `segment` steps, of which one in `every` is checkpointed."""

    segment, every, preserve = 1, 1, True
    policy: Callable[[], Any] = staticmethod(noop_context_fn)

    def _halves(self, x: Tensor, copy: bool = True) -> Streams:
        assert self.split_dim is not None
        a, b = x.chunk(2, self.split_dim)  # no copies: they would be held
        return a, b

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        a, b = self._split(x)
        steps = iter(build_steps(self, x.dtype, args, kwargs, None))
        for index, run in enumerate(iter(lambda: list(islice(steps, self.segment)), [])):
            if index % self.every:
                a, b = _run(run, a, b)
            else:
                a, b = checkpoint(
                    _run, run, a, b, use_reentrant=False, preserve_rng_state=self.preserve, context_fn=self.policy
                )
        return self._join(a, b)


def _run(steps: list[Step], a: Tensor, b: Tensor) -> Streams:
    for step in steps:
        a, b = step.run(a, b)
    return a, b


class OnCPU(CoupledSequential):
    """Ordinary autograd with what it saves in host memory."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        with save_on_cpu(pin_memory=x.is_cuda):
            return super().forward(x, *args, **kwargs)


# What FlopCounterMode counts, and the CPU's attention, which it does not.
COUNTED = [
    op
    for packet in (*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    if isinstance(packet, torch._ops.OpOverloadPacket)
    for op in (getattr(packet, overload) for overload in packet.overloads())
]


def checkpointed(segment: int | None = 1, every: int = 1, selective: bool = False) -> Any:
    """Segments of so many blocks, None for the root of their number; one in `every` of them is checkpointed.

    `selective` keeps the outputs of what FlopCounterMode counts.
    """

    def build(stack: CoupledSequential, draws: bool) -> nn.Module:
        stack.__class__ = Checkpointed
        assert isinstance(stack, Checkpointed)
        stack.segment = segment or max(1, round(math.sqrt(len(stack))))
        stack.every, stack.preserve = every, draws
        if every > 1 and len(stack) == 1:
            raise Inexpressible("there is one block only")
        if selective:
            stack.policy = partial(create_selective_checkpoint_contexts, COUNTED)
        return stack

    return build


def plain(stack: CoupledSequential, draws: bool) -> nn.Module:
    return stack


def on_cpu(stack: CoupledSequential, draws: bool) -> nn.Module:
    stack.__class__ = OnCPU
    return stack


def ours(stack: CoupledSequential, draws: bool) -> nn.Module:
    return reversible(stack)


def reversible(stack: CoupledSequential, **options: Any) -> nn.Module:
    """Ours, without drift, which no peer measures.

    By default it is looked at in the first, second, fourth, eighth backward and so on: ten looks in a thousand steps,
    but every other of the few in which a build is timed.
    """
    quiet = {"on_drift": "ignore"} if stack.on_drift == "warn_once" else {}
    return ReversibleSequential(*stack, **{**stack.given, **quiet, **options})


def beside(stack: CoupledSequential, **options: Any) -> nn.Module:
    if not has_streams(next(stack.parameters()).device):
        raise Inexpressible("the device has no streams")
    return reversible(stack, **options)


def overlapping(stack: CoupledSequential, draws: bool) -> nn.Module:
    return beside(stack, overlap=True)


def offloading(stack: CoupledSequential, draws: bool) -> nn.Module:
    return beside(stack, treatments=["offload"] * len(stack))


class FastMemCNN(peers.MemCNN):
    passes, preserve = 1, False


class FastMemCNNThatDraws(peers.MemCNN):
    passes = 1


class FastRevTorch(peers.RevTorch):
    careful = False


def peer(cls: type[peers.Peer], drawing: type[peers.Peer] | None = None) -> Any:
    """A peer of additive couplings, and the class for blocks that draw, or None if it has no way to run them."""

    def build(stack: CoupledSequential, draws: bool) -> nn.Module:
        if {type(c) for c in stack.couplings} != {Additive} or stack.split_dim is None:
            raise Inexpressible("it is for additive couplings of the input's halves")
        if issubclass(cls, peers.Pairs) and len(peers.paired(list(stack))) != len(stack):
            raise Inexpressible("it couples blocks in pairs")
        chosen = drawing if draws else cls
        if chosen is None:
            raise Inexpressible("it sets the global generator's seed")
        return chosen(*stack, split_dim=stack.split_dim)

    return build


def momentumnet(stack: CoupledSequential, draws: bool) -> nn.Module:
    coupling = stack.couplings[0]
    if not isinstance(coupling, Momentum) or coupling.init is not None or stack.split_dim is not None:
        raise Inexpressible("it is for the momentum coupling of one stream")
    if draws:
        raise Inexpressible("it does not draw the same numbers again")
    return peers.MomentumNet(*stack, split_dim=None, coupling={"gamma": coupling.gamma})


CONTESTANTS = [
    Contestant("plain", plain),
    Contestant("checkpoint", checkpointed()),
    Contestant("checkpoint, every 2nd", checkpointed(every=2)),
    Contestant("checkpoint, every 4th", checkpointed(every=4)),
    Contestant("checkpoint, root of N", checkpointed(segment=None)),
    Contestant("checkpoint, selective", checkpointed(selective=True)),
    Contestant("save_on_cpu", on_cpu),
    Contestant("RevLib", peer(peers.RevLib, peers.RevLib), "revlib", True),
    Contestant("MemCNN", peer(FastMemCNN, FastMemCNNThatDraws), "memcnn", True),
    Contestant("RevTorch", peer(FastRevTorch), "revtorch", True),
    Contestant("momentumnet", momentumnet, "momentumnet", True),
    Contestant("reformer-pytorch", peer(peers.ReformerPytorch, peers.ReformerPytorch), "reformer_pytorch", True),
    Contestant("lightning_revlib", ours, "lightning_revlib", True),
    Contestant("lightning_revlib, overlap", overlapping, "lightning_revlib", True),
    Contestant("lightning_revlib, offload", offloading, "lightning_revlib"),
    Contestant("lightning_revlib, half of plain's bytes", ours, "lightning_revlib", budget=0.5),
]
