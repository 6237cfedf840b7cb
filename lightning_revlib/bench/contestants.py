"""Ways to execute a `CoupledSequential`, each a function from the stack to the module that is measured.

The function may change the stack that it is given. It raises `Inexpressible` if its library cannot run the stack.
Each contestant is set up for speed: random states are preserved only if blocks draw random numbers, and drift is
ignored, since no peer measures it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.flop_counter import flop_registry

from lightning_revlib.bench import peers
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.nn import Additive, CoupledSequential, Coupling, Momentum, swap

Streams: TypeAlias = tuple[Tensor, Tensor]
Build: TypeAlias = Callable[[CoupledSequential, bool], nn.Module]


@dataclass(frozen=True)
class Contestant:
    """One way to execute a stack: `build(stack, draws)` returns the module to run.

    `draws` says whether blocks draw random numbers. `budget`, in bytes or as a fraction of ordinary autograd's peak,
    is shared by all stacks of a model.
    """

    name: str
    build: Build
    package: str = "torch"
    reversible: bool = False  # holds no activations for each block
    budget: int | float | None = None

    @property
    def installed(self) -> bool:
        """Return whether the contestant's package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """Return the version of the contestant's package."""
        if self.package == "lightning_revlib":
            from lightning_revlib import __version__

            return __version__
        return importlib.metadata.version(self.package) if self.installed else "not installed"


class Checkpointed(nn.Module):
    """The stack's function under `torch.utils.checkpoint`, in segments of which one in `every` is checkpointed.

    Streams are views of the input, since copies would be held.
    """

    def __init__(
        self, stack: CoupledSequential, segment: int, every: int, preserve: bool, policy: Callable[[], Any]
    ) -> None:
        super().__init__()
        if stack.grid_bits is not None or stack.branches or stack.residual:
            raise Inexpressible("grid_bits, branches and residual are options of CoupledSequential only")
        self.stack, self.segment, self.every, self.preserve, self.policy = stack, segment, every, preserve, policy

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim, couplings = self.stack.split_dim, cycle(self.stack.couplings)
        a, b = self.stack.couplings[0].start(x) if dim is None else x.chunk(2, dim)
        steps = [(block, None if hasattr(block, "inverse") else next(couplings)) for block in self.stack]
        for index, first in enumerate(range(0, len(steps), self.segment)):
            run = partial(_run, steps[first : first + self.segment], args, kwargs)
            if index % self.every:
                a, b = run(a, b)
            else:
                a, b = checkpoint(
                    run, a, b, use_reentrant=False, preserve_rng_state=self.preserve, context_fn=self.policy
                )
        if dim is not None:
            return torch.cat((a, b), dim)
        last = next(coupling for _, coupling in reversed(steps) if coupling is not None)
        return last.finish(a, b)


def _run(steps: Sequence[tuple[Any, Coupling | None]], args: Any, kwargs: Any, a: Tensor, b: Tensor) -> Streams:
    """Run steps by ordinary autograd; a step without a coupling applies its module to both streams."""
    for block, coupling in steps:
        a, b = (block(a), block(b)) if coupling is None else coupling.forward(a, b, block(b, *args, **kwargs))
    return a, b


class OnCPU(nn.Module):
    """Ordinary autograd whose saved tensors lie in host memory."""

    def __init__(self, stack: CoupledSequential) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with save_on_cpu(pin_memory=x.is_cuda):
            return self.stack(x, *args, **kwargs)


# What FlopCounterMode counts, and the CPU's attention, which it does not count.
COUNTED = [
    op
    for packet in (*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    if hasattr(packet, "overloads")
    for op in (getattr(packet, overload) for overload in packet.overloads())
]


def checkpointed(segment: int | None = 1, every: int = 1, selective: bool = False) -> Build:
    """Return a build that checkpoints segments of `segment` blocks; None takes the square root of their number.

    One in `every` segments is checkpointed. `selective` keeps the outputs of the operations that FlopCounterMode
    counts.
    """

    def build(stack: CoupledSequential, draws: bool) -> nn.Module:
        if every > 1 and len(stack) == 1:
            raise Inexpressible("there is one block only")
        length = segment or max(1, round(math.sqrt(len(stack))))
        policy = partial(create_selective_checkpoint_contexts, COUNTED) if selective else noop_context_fn
        return Checkpointed(stack, length, every, preserve=draws, policy=policy)

    return build


def plain(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Return the stack as it is, which ordinary autograd differentiates."""
    return stack


def on_cpu(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Build the contestant that keeps saved tensors in host memory."""
    return OnCPU(stack)


def ours(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Make the stack reversible."""
    return reversible(stack)


def reversible(stack: CoupledSequential, **options: Any) -> nn.Module:
    """Make the stack reversible with `options`, in place, and ignore drift unless the stack asks for more.

    The default looks at drift in the first, second, fourth, eighth backward and so on. These are ten looks in a
    thousand steps, but every other one of the few steps in which a build is timed.
    """
    quiet = {"on_drift": "ignore"} if stack.on_drift == "warn_once" else {}
    swap(stack, {"": {**quiet, **options}})
    return stack


def _on_streams(stack: CoupledSequential, **options: Any) -> nn.Module:
    """Make the stack reversible with options that need a device with streams."""
    if next(stack.parameters()).device.type == "cpu":
        raise Inexpressible("the device has no streams")
    return reversible(stack, **options)


def overlapping(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Make the stack reversible with overlap of the streams' reconstruction and the blocks' backward."""
    return _on_streams(stack, overlap=True)


def offloading(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Make the stack keep all that it saves in host memory."""
    return _on_streams(stack, treatments=["offload"] * len(stack))


class FastMemCNN(peers.MemCNN):
    """MemCNN for one backward of blocks that draw no random numbers."""

    passes, preserve = 1, False


class FastMemCNNThatDraws(peers.MemCNN):
    """MemCNN for one backward."""

    passes = 1


class FastRevTorch(peers.RevTorch):
    """RevTorch for one backward of blocks that draw no random numbers."""

    careful = False


def peer(cls: type[peers.Peer], drawing: type[peers.Peer] | None = None) -> Build:
    """Return a build of a peer for additive couplings.

    `drawing` is the class for blocks that draw random numbers, None if the peer cannot run them.
    """

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
    """Build momentumnet's module for a momentum coupling of one stream."""
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
