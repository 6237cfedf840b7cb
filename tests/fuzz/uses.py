"""What random programs do with a model: each function is run for both models, and returns tensors to compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Run(Protocol):
    """A model with what it is called with."""

    program: Any
    model: nn.Module
    params: list[Tensor]  # what gets gradients besides the input: parameters, and arguments

    def input(self) -> Tensor: ...
    def call(self, x: Tensor, model: Any = None) -> tuple[Tensor, list[Tensor]]: ...
    def loss(self, y: Tensor, losses: list[Tensor]) -> Tensor: ...
    def fresh(self) -> nn.Module: ...


Use = Callable[[Run], "list[Tensor | None]"]
USES: dict[str, Use] = {}
COPIES = ("deep copy", "state dict")  # which make modules: those of lists are freed by the collector


def use(run: Use) -> Use:
    USES[run.__name__.strip("_").replace("_", " ")] = run
    return run


@use
def step(run: Run) -> list[Tensor | None]:
    x = run.input()
    y, losses = run.call(x)
    total = run.loss(y, losses)
    if total.requires_grad:
        total.backward()
    return [y.detach(), *[loss.detach() for loss in losses]]


@use
def training(run: Run) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for _ in range(3):
        found += step(run)
        with torch.no_grad():
            for p in run.params:
                if p.grad is not None:
                    p -= 0.01 * p.grad / (1 + p.grad.norm())
    return found


@use
def retain_graph(run: Run) -> list[Tensor | None]:
    y, losses = run.call(run.input())
    total = run.loss(y, losses)
    for again in (True, True, False):
        total.backward(retain_graph=again)
    return [y.detach()]


@use
def double_backward(run: Run) -> list[Tensor | None]:
    x = run.input()
    inputs = [t for t in (x, *run.params) if t.requires_grad]
    grads = torch.autograd.grad(run.loss(*run.call(x)), inputs, create_graph=True, allow_unused=True)
    penalty = sum(grad.square().sum() for grad in grads if grad is not None)
    return [
        *[None if grad is None else grad.detach() for grad in grads],
        *torch.autograd.grad(penalty, inputs, allow_unused=True),
    ]


@use
def two_forwards(run: Run) -> list[Tensor | None]:
    x = run.input()
    totals = [run.loss(*run.call(x * k)) for k in (1.0, 0.5)]
    (totals[0] + totals[1]).backward()
    return []


@use
def backwards_in_turn(run: Run) -> list[Tensor | None]:
    totals = [run.loss(*run.call(run.input() * k)) for k in (1.0, 0.5, 2.0)]
    for index in (1, 0, 2):
        totals[index].backward()
    return []


@use
def given_up(run: Run) -> list[Tensor | None]:
    run.call(run.input())
    return step(run)


@use
def applied_twice(run: Run) -> list[Tensor | None]:
    first, losses = run.call(run.input())
    run.loss(run.call(first.tanh())[0], losses).backward()
    return []


@use
def part(run: Run) -> list[Tensor | None]:
    x = run.input()
    total = run.loss(*run.call(x))
    some = [t for t in (run.params[1::2] or run.params) if t.requires_grad] or [x]
    return [*torch.autograd.grad(total, some, allow_unused=True)]


@use
def input_only(run: Run) -> list[Tensor | None]:
    x = run.input()
    return [*torch.autograd.grad(run.loss(*run.call(x)), x)]


@use
def extras_first(run: Run) -> list[Tensor | None]:
    y, losses = run.call(run.input())
    if losses:
        sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
    run.loss(y, []).backward()
    return []


@use
def extras_last(run: Run) -> list[Tensor | None]:
    y, losses = run.call(run.input())
    run.loss(y, []).backward(retain_graph=bool(losses))
    if losses:
        sum(losses).backward()  # type: ignore[union-attr]
    return []


@use
def no_grad_between(run: Run) -> list[Tensor | None]:
    total = run.loss(*run.call(run.input()))
    with torch.no_grad():
        plain, _ = run.call(run.input())
    total.backward()
    return [plain]


@use
def eval_between(run: Run) -> list[Tensor | None]:
    modes = [m.training for m in run.model.modules()]
    total = run.loss(*run.call(run.input()))
    run.model.eval()
    total.backward()
    with torch.no_grad():
        plain, _ = run.call(run.input())
    for m, mode in zip(run.model.modules(), modes, strict=True):
        m.training = mode
    return [plain]


@use
def frozen_between(run: Run) -> list[Tensor | None]:
    params = list(run.model.parameters())
    flags = [p.requires_grad for p in params]
    total = run.loss(*run.call(run.input()))
    for p in params[::2]:
        p.requires_grad_(False)
    total.backward()
    for p, flag in zip(params, flags, strict=True):
        p.requires_grad_(flag)
    return []


@use
def functional_call(run: Run) -> list[Tensor | None]:
    other = {name: (p.detach() + 0.01).requires_grad_(p.requires_grad) for name, p in run.model.named_parameters()}
    total = run.loss(*run.call(run.input(), lambda *a, **k: torch.func.functional_call(run.model, other, a, k)))
    total.backward()
    return [p.grad for p in other.values()]


@use
def checkpoint_around(run: Run) -> list[Tensor | None]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run.model, *args, use_reentrant=False, **kwargs)

    run.loss(*run.call(run.input(), call)).backward()
    return []


@use
def deep_copy(run: Run) -> list[Tensor | None]:
    other = copy.deepcopy(run.model)
    other.zero_grad()
    run.loss(*run.call(run.input(), other)).backward()
    return [p.grad for p in other.parameters()]


@use
def state_dict(run: Run) -> list[Tensor | None]:
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    run.loss(*run.call(run.input(), other)).backward()
    return [*[p.grad for p in other.parameters()], *other.buffers()]


@use
def hooks(run: Run) -> list[Tensor | None]:
    seen: list[Tensor | None] = []
    blocks = [m for m in run.model.modules() if type(m).__name__ == "Block"][1::2]
    handles = [p.register_hook(lambda grad: 2 * grad) for p in run.params[::3] if p.requires_grad]
    if run.program.kind == "sequential":  # calls of a list's layers must not change, and contain the coupling
        for block in blocks:
            handles.append(block.register_full_backward_hook(lambda m, given, grads: seen.extend(given)))
            handles.append(block.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:])))
    y, losses = run.call(run.input())
    if y.requires_grad:
        y.register_hook(lambda grad: 3 * grad)
    run.loss(y, losses).backward()
    for handle in handles:
        handle.remove()
    return [None if t is None else t.detach().clone() for t in seen]
