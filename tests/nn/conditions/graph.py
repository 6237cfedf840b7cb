"""Conditions on how a graph is differentiated: several backwards, several forwards, hooks, extra losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.nn.conditions.base import Case, condition


@condition
def retain_graph(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.3), nn.Tanh()) for _ in range(4)]), case.input()
    loss = case.loss(case.call(stack, x))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *case.gradients(stack)]


@condition
def several_forwards_first(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.3), nn.Tanh()) for _ in range(4)]), case.input()
    losses = [case.loss(case.call(stack, x * k)) for k in (1.0, 2.0, 3.0)]
    for loss in (losses[1], losses[0], losses[2]):
        loss.backward()
    return [x.grad, *case.gradients(stack)]


@condition
def stack_applied_twice(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(3), case.input()
    y = case.call(stack, case.call(stack, x))
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(stack)]


@condition
def weights_shared_between_stacks(case: Case) -> list[Tensor | None]:
    block = case.block(nn.Tanh())
    first, second, x = case.stack(block, block), case.stack(block, case.block(nn.Tanh())), case.input()
    y = case.call(second, case.call(first, x).tanh())
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(first), *case.gradients(second)]


@condition
def grad_of_input_only(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    return [*torch.autograd.grad(case.loss(case.call(stack, x)), x), *case.gradients(stack)]


@condition
def grad_of_parameters_only(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    return [*torch.autograd.grad(case.loss(case.call(stack, x)), list(stack.parameters())), x.grad]


@condition
def grad_of_one_block(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    return list(torch.autograd.grad(case.loss(case.call(stack, x)), list(stack[1].parameters())))


@condition
def double_backward(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(3), case.input()
    (grad,) = torch.autograd.grad(case.loss(case.call(stack, x)), x, create_graph=True)
    grad.square().sum().backward()
    return [grad, x.grad, *case.gradients(stack)]


@condition
def anomaly_mode(case: Case) -> list[Tensor | None]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return case.train(case.mlp(3))


@condition
def hooks(case: Case) -> list[Tensor | None]:
    stack, x, seen = case.mlp(3), case.input(), []
    stack[1].register_full_backward_hook(lambda m, grad_in, grad_out: seen.extend(grad_in))
    stack[2][0].weight.register_hook(lambda grad: 2 * grad)
    y = case.call(stack, x)
    y.register_hook(lambda grad: 3 * grad)
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(stack), *seen]


class Leaves(nn.Module):
    """Leaves a loss on itself, as mixtures of experts do."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = case.block(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.aux = out.float().square().mean() if not torch.is_inference_mode_enabled() else None
        return out


def _with_auxiliary(case: Case, order: str) -> list[Tensor | None]:
    stack, x = case.stack(*[Leaves(case) for _ in range(3)]), case.input()
    y = case.call(stack, x)
    main, aux = case.loss(y), torch.stack([block.aux for block in stack]).sum()
    losses = {"m": main, "a": aux, "s": main + aux}
    for k, which in enumerate(order):
        losses[which].backward(retain_graph=k + 1 < len(order))
    return [y, x.grad, *case.gradients(stack)]


@condition
def auxiliary_loss_summed(case: Case) -> list[Tensor | None]:
    return _with_auxiliary(case, "s")


@condition
def auxiliary_loss_first(case: Case) -> list[Tensor | None]:
    return _with_auxiliary(case, "am")


@condition
def auxiliary_loss_last(case: Case) -> list[Tensor | None]:
    return _with_auxiliary(case, "ma")


@condition
def auxiliary_loss_alone(case: Case) -> list[Tensor | None]:
    return _with_auxiliary(case, "a")
