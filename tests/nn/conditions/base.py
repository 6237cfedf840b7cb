"""What a condition gets, and the registry of conditions.

A condition is what users do with a stack, one function each; `test_matrix` runs each with every coupling and dtype. It
gets a `Case` and returns the tensors to compare. It runs twice, and `case.stack(...)` builds a CoupledSequential and
then a ReversibleSequential of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_revlib as revlib

CONDITIONS: dict[str, Callable[[Case], list[Tensor | None]]] = {}
WIDTH, BATCH = 6, 4


def condition(run: Callable[[Case], list[Tensor | None]]) -> Callable[[Case], list[Tensor | None]]:
    CONDITIONS[run.__name__] = run
    return run


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return the same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(torch.empty(0).device)


@dataclass
class Case:
    """What a condition runs with: the class and options of its stacks, and the size and dtype of its tensors."""

    cls: type[nn.Module]
    options: dict[str, Any]  # of the stack: the coupling, or a pair of callables, or the grid
    dtype: torch.dtype
    autocast: bool
    width: int = WIDTH  # of a stream
    batch: int = BATCH

    def forward_context(self) -> Any:
        return torch.autocast(torch.empty(0).device.type, torch.bfloat16) if self.autocast else nullcontext()

    @property
    def exact(self) -> bool:
        return "grid_bits" in self.options

    @property
    def out_width(self) -> int:
        """Return the width that a block has to return for a stream."""
        coupling = self.options.get("coupling", "additive")
        first = revlib.get_coupling(coupling[0] if isinstance(coupling, list) else coupling)
        return first.branch_shape(torch.Size([self.batch, self.width]))[1]

    def block(self, *before: nn.Module, after: tuple[nn.Module, ...] = ()) -> nn.Module:
        return nn.Sequential(*before, nn.Linear(self.width, self.out_width), *after)

    def stack(self, *blocks: nn.Module, **options: Any) -> nn.Module:
        return self.cls(*blocks, **{**self.options, **options}).to(self.dtype)

    def mlp(self, depth: int = 4) -> nn.Module:
        return self.stack(*[self.block(nn.Linear(self.width, self.width), nn.Tanh()) for _ in range(depth)])

    def input(self, requires_grad: bool = True, *, width: int | None = None) -> Tensor:
        width = 2 * self.width if width is None else width
        return drawn(7, self.batch, width, dtype=self.dtype).requires_grad_(requires_grad)

    def call(self, stack: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.forward_context():
            return stack(x, *args, **kwargs)

    def loss(self, y: Tensor) -> Tensor:
        return (y * drawn(8, *y.shape, dtype=self.dtype)).sum() + y.square().mean()

    def train(self, stack: nn.Module, x: Tensor | None = None, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        """Run one forward and backward, and return output, gradients and buffers."""
        x = self.input() if x is None else x
        y = self.call(stack, x, *args, **kwargs)
        if y.requires_grad:
            self.loss(y).backward()
        return [y, x.grad, *self.gradients(stack)]

    def gradients(self, stack: nn.Module) -> list[Tensor | None]:
        """Return the gradients of parameters, and buffers."""
        return [*[p.grad for p in stack.parameters()], *[b.double() for b in stack.buffers()]]
