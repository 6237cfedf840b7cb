"""Conditions on random numbers that blocks draw, and on buffers that they change."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.nn.conditions.base import Case, condition


@condition
def dropout(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Dropout(0.5), after=(nn.Dropout(0.2),)) for _ in range(4)]))


@condition
def dropout_in_some(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(case.block(), case.block(nn.Dropout(0.5)), case.block(nn.Tanh()), case.block()))


@condition
def draws_unexpectedly(case: Case) -> list[Tensor | None]:
    parts = (nn.BatchNorm1d(case.width), nn.Dropout(0.3), nn.Tanh())
    stack = case.stack(*[case.block(*copy.deepcopy(parts)) for _ in range(4)])
    quiet = case.train(stack.eval())  # the engine learns that this stack does not draw
    loud = case.train(stack.train())
    return [*quiet, *loud, *case.train(stack)]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x) + torch.randn(x.shape, dtype=x.dtype)


@condition
def functional_noise(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(Noisy(), nn.Tanh()) for _ in range(3)]))


@condition
def batch_norm(case: Case) -> list[Tensor | None]:
    return case.train(
        case.stack(
            *[case.block(nn.BatchNorm1d(case.width), nn.ReLU(), nn.Linear(case.width, case.width)) for _ in range(4)]
        )
    )


@condition
def batch_norm_cumulative(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(nn.BatchNorm1d(case.width, momentum=None), nn.Tanh()) for _ in range(3)])
    return [*case.train(stack), *case.train(stack)]


@condition
def batch_norm_eval(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(nn.BatchNorm1d(case.width), nn.ReLU()) for _ in range(3)])
    case.train(stack)
    return case.train(stack.eval())


@condition
def batch_norm_shared(case: Case) -> list[Tensor | None]:
    norm = nn.BatchNorm1d(case.width)
    return case.train(case.stack(*[case.block(norm, nn.Tanh()) for _ in range(3)]))


@condition
def spectral(case: Case) -> list[Tensor | None]:
    return case.train(
        case.stack(*[case.block(spectral_norm(nn.Linear(case.width, case.width)), nn.Tanh()) for _ in range(3)])
    )


class Counter(nn.Module):
    """Changes what it reads: a counter in place, an average by a new tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        out = x * (1 + 0.1 * self.calls.to(x.dtype)) + self.mean.to(x.dtype)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0).to(self.mean.dtype)
        return out


@condition
def changing_buffers(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(Counter(case.width), nn.Tanh()) for _ in range(3)])
    first, second = case.call(stack, case.input()), case.call(stack, case.input())
    (case.loss(first) + case.loss(second)).backward()
    return [first, second, *case.gradients(stack)]


@condition
def tied_weights(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Tanh())] * 4))
