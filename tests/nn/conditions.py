"""What users do with a stack, one function a condition; `test_matrix` runs each with every coupling and dtype.

A condition gets a `Case` and returns the tensors to compare. It is run twice, with the case's
`stack(...)` building a CoupledSequential and then a ReversibleSequential of the same weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lightning_revlib as revlib

CONDITIONS: dict[str, Callable[[Case], list[Tensor | None]]] = {}
WIDTH, BATCH = 6, 4


def condition(run: Callable[[Case], list[Tensor | None]]) -> Callable[[Case], list[Tensor | None]]:
    CONDITIONS[run.__name__] = run
    return run


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


@dataclass
class Case:
    cls: type[nn.Module]
    options: dict[str, Any]  # of the stack: the coupling, or a pair of callables, or the grid
    dtype: torch.dtype
    autocast: bool

    def forward_context(self) -> Any:
        return torch.autocast(torch.get_default_device().type, torch.bfloat16) if self.autocast else nullcontext()

    @property
    def exact(self) -> bool:
        return "grid_bits" in self.options

    @property
    def out_width(self) -> int:
        """What a block has to return for a stream of WIDTH."""
        coupling = self.options.get("coupling", "additive")
        first = revlib.get_coupling(coupling[0] if isinstance(coupling, list) else coupling)
        return first.branch_shape(torch.Size([BATCH, WIDTH]))[1]

    def block(self, *before: nn.Module, after: tuple[nn.Module, ...] = ()) -> nn.Module:
        return nn.Sequential(*before, nn.Linear(WIDTH, self.out_width), *after)

    def stack(self, *blocks: nn.Module, **options: Any) -> nn.Module:
        return self.cls(*blocks, **{**self.options, **options}).to(self.dtype)

    def mlp(self, depth: int = 4) -> nn.Module:
        return self.stack(*[self.block(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)])

    def input(self, requires_grad: bool = True, *, width: int = 2 * WIDTH) -> Tensor:
        return drawn(7, BATCH, width, dtype=self.dtype).requires_grad_(requires_grad)

    def call(self, stack: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.forward_context():
            return stack(x, *args, **kwargs)

    def loss(self, y: Tensor) -> Tensor:
        return (y * drawn(8, *y.shape, dtype=self.dtype)).sum() + y.square().mean()

    def train(self, stack: nn.Module, x: Tensor | None = None, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        """One forward and backward; output, gradients and buffers."""
        x = self.input() if x is None else x
        y = self.call(stack, x, *args, **kwargs)
        if y.requires_grad:
            self.loss(y).backward()
        return [y, x.grad, *gradients(stack)]


def gradients(stack: nn.Module) -> list[Tensor | None]:
    return [*[p.grad for p in stack.parameters()], *[b.double() for b in stack.buffers()]]


# --- what blocks are made of ---------------------------------------------------------------------


@condition
def mlp(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp())


@condition
def odd_depth(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(5))


@condition
def one_block(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(1))


@condition
def chunks(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)], chunks=[1, 3]))


@condition
def bare_linear(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[nn.Linear(WIDTH, case.out_width) for _ in range(4)]))


def _layout(case: Case, x: Tensor, **options: Any) -> list[Tensor | None]:
    """What kernels save depends on how memory is laid out; the blocks are bare, to see their input's layout."""
    stack = case.stack(*[nn.Linear(WIDTH, case.out_width) for _ in range(3)], **options)
    leaf = x.detach().requires_grad_()
    y = case.call(stack, leaf)
    case.loss(y).backward()
    return [y, leaf.grad, *gradients(stack)]


def _last(case: Case) -> dict[str, Any]:
    """Options for streams along the last dimension."""
    coupling = case.options.get("coupling")
    return {"split_dim": -1, **({"coupling": {"name": "affine", "dim": -1}} if coupling == "affine" else {})}


def _tokens(case: Case, *shape: int) -> Tensor:
    return drawn(9, *shape, dtype=case.dtype)


@condition
def as_many_tokens_as_channels(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, 2, WIDTH // 2, 2 * WIDTH), **_last(case))


@condition
def three_dimensions(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, 4, 5, 2 * WIDTH), **_last(case))


@condition
def one_sample(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, 1, WIDTH, 2 * WIDTH), **_last(case))


@condition
def transposed_input(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, WIDTH, 2, 2 * WIDTH).transpose(0, 1), **_last(case))


@condition
def expanded_input(case: Case) -> list[Tensor | None]:
    x = _tokens(case, 1, 1, 2 * WIDTH).requires_grad_()
    stack = case.stack(*[nn.Linear(WIDTH, case.out_width) for _ in range(3)], **_last(case))
    y = case.call(stack, x.expand(2, WIDTH // 2, -1))
    case.loss(y).backward()
    return [y, x.grad, *gradients(stack)]


@condition
def transposed_and_duplicated_input(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, WIDTH, 2, WIDTH).transpose(0, 1), **{**_last(case), "split_dim": None})


class Turned(nn.Module):
    """Gives its branch in another layout than its input's."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, case.out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).transpose(0, 1).contiguous().transpose(0, 1)


@condition
def branches_in_another_layout(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[Turned(case) for _ in range(4)], **_last(case)), _tokens(case, 3, 2, 2 * WIDTH)
    return case.train(stack, x.requires_grad_())


@condition
def channels_last(case: Case) -> list[Tensor | None]:
    blocks = [nn.Conv2d(WIDTH, case.out_width, 3, padding=1) for _ in range(3)]
    x = _tokens(case, 2, 2 * WIDTH, 4, 4).to(memory_format=torch.channels_last)
    return case.train(case.stack(*blocks, split_dim=1), x.requires_grad_())


class Wide(nn.Module):
    """The identity, repeated where the coupling needs a wider branch; saves nothing, has no parameters."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.times, 1) if self.times > 1 else x


@condition
def identity_between(case: Case) -> list[Tensor | None]:
    wide = Wide(case.out_width // WIDTH)
    return case.train(case.stack(wide, case.block(nn.Tanh()), wide, case.block(nn.Tanh()), wide))


@condition
def identity_only(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[Wide(case.out_width // WIDTH) for _ in range(3)]))


@condition
def dropout(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Dropout(0.5), after=(nn.Dropout(0.2),)) for _ in range(4)]))


@condition
def dropout_in_some(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(case.block(), case.block(nn.Dropout(0.5)), case.block(nn.Tanh()), case.block()))


@condition
def draws_unexpectedly(case: Case) -> list[Tensor | None]:
    parts = (nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Tanh())
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
        case.stack(*[case.block(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)])
    )


@condition
def batch_norm_cumulative(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(nn.BatchNorm1d(WIDTH, momentum=None), nn.Tanh()) for _ in range(3)])
    return [*case.train(stack), *case.train(stack)]


@condition
def batch_norm_eval(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(3)])
    case.train(stack)
    return case.train(stack.eval())


@condition
def batch_norm_shared(case: Case) -> list[Tensor | None]:
    norm = nn.BatchNorm1d(WIDTH)
    return case.train(case.stack(*[case.block(norm, nn.Tanh()) for _ in range(3)]))


@condition
def spectral(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()) for _ in range(3)]))


class Counter(nn.Module):
    """Changes what it reads: a counter in place, an average by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out = x * (1 + 0.1 * self.calls.to(x.dtype)) + self.mean.to(x.dtype)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0).to(self.mean.dtype)
        return out


@condition
def changing_buffers(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[case.block(Counter(), nn.Tanh()) for _ in range(3)])
    first, second = case.call(stack, case.input()), case.call(stack, case.input())
    (case.loss(first) + case.loss(second)).backward()
    return [first, second, *gradients(stack)]


@condition
def tied_weights(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Tanh())] * 4))


@condition
def inplace_inside(case: Case) -> list[Tensor | None]:
    blocks = [case.block(nn.Linear(WIDTH, WIDTH), nn.ELU(inplace=True)) for _ in range(3)]
    return case.train(case.stack(*blocks))


class Twice(torch.autograd.Function):
    """x^2 y; its backward asks for its saved tensors twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * ctx.saved_tensors[1] * grad, ctx.saved_tensors[0] ** 2 * grad


class UsesTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x, x.tanh())


@condition
def saved_tensors_asked_twice(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(UsesTwice(), nn.Tanh()) for _ in range(3)]))


@condition
def saved_tensors_of_chunks_asked_twice(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(UsesTwice(), nn.Tanh()) for _ in range(3)], chunks=[2, 1]))


class Force(nn.Module):
    """The gradient of a potential, by autograd inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            position = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.potential(position).tanh().square().sum()
            return torch.autograd.grad(energy, position, create_graph=True)[0]


@condition
def autograd_inside_a_block(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(Force()) for _ in range(3)]))


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


@condition
def checkpoint_inside(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[Checkpointed(case.block(nn.Dropout(0.3), nn.Tanh())) for _ in range(3)]))


@condition
def checkpoint_around(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    with case.forward_context():
        y = checkpoint(stack, x, use_reentrant=False)
    case.loss(y).backward()
    return [y, x.grad, *gradients(stack)]


@condition
def stack_in_a_stack(case: Case) -> list[Tensor | None]:
    def inner() -> nn.Module:
        parts = [nn.Sequential(nn.Linear(WIDTH // 2, WIDTH // 2), nn.Tanh()) for _ in range(3)]
        grid = {"grid_bits": 12} if case.exact else {}
        return nn.Sequential(case.cls(*parts, **grid), nn.Dropout(0.3), nn.Linear(WIDTH, case.out_width))

    return case.train(case.stack(*[inner() for _ in range(3)]))


class Roll(nn.Module):
    """An invertible step: a fixed permutation."""

    exact = True

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=-1)

    def inverse(self, y: Tensor) -> Tensor:
        return y.roll(-1, dims=-1)


class Stretch(nn.Module):
    """An invertible step with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.linspace(-0.3, 0.3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.to(x.dtype).exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log.to(y.dtype)).exp()


@condition
def invertible_steps(case: Case) -> list[Tensor | None]:
    middle = Roll() if case.exact else Stretch()
    return case.train(case.stack(Roll(), case.block(nn.Tanh()), middle, case.block(nn.Tanh()), Roll()))


@condition
def library_invertible_steps(case: Case) -> list[Tensor | None]:
    middle = revlib.Permutation(WIDTH) if case.exact else revlib.Orthogonal(WIDTH)
    return case.train(case.stack(revlib.Permutation(WIDTH), case.block(nn.Tanh()), middle, case.block(nn.Tanh())))


# --- what requires grad --------------------------------------------------------------------------


@condition
def input_without_grad(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(), case.input(requires_grad=False))


@condition
def frozen_first_blocks(case: Case) -> list[Tensor | None]:
    stack = case.mlp()
    stack[:2].requires_grad_(False)
    return case.train(stack, case.input(requires_grad=False))


@condition
def frozen_middle_block(case: Case) -> list[Tensor | None]:
    stack = case.mlp()
    stack[1].requires_grad_(False)
    return case.train(stack)


@condition
def frozen_all_but_input(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp().requires_grad_(False))


@condition
def nothing_requires_grad(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp().requires_grad_(False), case.input(requires_grad=False))


@condition
def frozen_between_forward_and_backward(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    y = case.call(stack, x)
    stack.requires_grad_(False)
    case.loss(y).backward()
    return [y, x.grad, *gradients(stack)]


@condition
def eval_between_forward_and_backward(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)) for _ in range(3)]), case.input()
    y = case.call(stack, x)
    stack.eval()
    case.loss(y).backward()
    assert not any(m.training for m in stack.modules())
    return [y, x.grad, *gradients(stack)]


class Settles(nn.Module):
    """Drops out in its first call only, and leaves itself so."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body, self.dropout = case.block(nn.Tanh()), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.dropout(x))
        self.dropout.eval()
        return out


@condition
def flags_that_blocks_change_for_good(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[Settles(case) for _ in range(3)])
    first = case.train(stack)
    assert not any(block.dropout.training for block in stack)  # type: ignore[union-attr]
    return [*first, *case.train(stack)]


@condition
def functional_call(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    other = {name: (p.detach() + 0.1).requires_grad_() for name, p in stack.named_parameters()}
    with case.forward_context():
        y = torch.func.functional_call(stack, other, (x,))
    case.loss(y).backward()
    return [y, x.grad, *[p.grad for p in other.values()], *gradients(stack)]


# --- arguments -----------------------------------------------------------------------------------


class Conditioned(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = case.block(nn.Tanh())

    def forward(self, x: Tensor, *args: Any, scale: Any = None, memory: Any = None) -> Tensor:
        for arg in args:
            x = x + arg if arg is not None else x
        out = self.body(x if memory is None else x * memory["key"].sigmoid())
        return out if scale is None else out * scale


@condition
def arguments_of_all_kinds(case: Case) -> list[Tensor | None]:
    stack, x, leaf = case.stack(*[Conditioned(case) for _ in range(3)]), case.input(), case.input(width=WIDTH)
    shift = torch.ones(WIDTH, dtype=case.dtype)
    result = case.train(stack, x, shift, None, scale=0.5, memory={"key": leaf * 2, "name": "memory"})
    return [*result, leaf.grad]


@condition
def layerwise_arguments(case: Case) -> list[Tensor | None]:
    stack, x, leaf = case.stack(*[Conditioned(case) for _ in range(3)]), case.input(), case.input(width=WIDTH)
    calls = [((leaf * k,), {"scale": k + 1.0}) for k in range(3)]
    return [*case.train(stack, x, 0.1, layerwise=calls), leaf.grad]


class Attends(nn.Module):
    """Returns its branch, a loss, and weights that no gradient flows through, in one of three ways."""

    def __init__(self, case: Case, how: str) -> None:
        super().__init__()
        self.body, self.how = case.block(nn.Tanh()), how

    def forward(self, x: Tensor) -> Any:
        out = self.body(x)
        aux, weights = out.to(x.dtype).square().mean(), x.detach().softmax(-1)
        return {
            "tuple": (out, aux, None, weights),
            "dict": {"out": out, "aux": aux, "weights": weights},
            "dataclass": Output(out, aux, weights),
        }[self.how]


@dataclass
class Output:
    out: Tensor
    aux: Tensor
    weights: Tensor


def _with_extras(case: Case, order: str) -> list[Tensor | None]:
    kinds = ("tuple", "dict", "dataclass")
    stack, x = case.stack(*[Attends(case, how) for how in kinds], case.block()), case.input()
    y, extras = case.call(stack, x)
    assert extras[3] is None and [type(extra) for extra in extras[:3]] == [tuple, dict, dict]
    main, aux = case.loss(y), extras[0][0] + 2 * extras[1]["aux"] + 3 * extras[2]["aux"]
    losses = {"m": main, "a": aux, "s": main + aux}
    if order == "a":
        del y, main, losses["m"], losses["s"]  # the output is gone before the backward
    for k, which in enumerate(order):
        losses[which].backward(retain_graph=k + 1 < len(order))
    return [aux, extras[0][2], extras[2]["weights"], x.grad, *gradients(stack)]


@condition
def extra_outputs(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "s")


@condition
def extra_outputs_first(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "am")


@condition
def extra_outputs_last(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "ma")


@condition
def extra_outputs_alone(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "a")


@condition
def duplicated_input(case: Case) -> list[Tensor | None]:
    blocks = [case.block(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    return case.train(case.stack(*blocks, split_dim=None), case.input(width=WIDTH))


@condition
def negative_split_dim(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Tanh()) for _ in range(3)], split_dim=-1))


# --- what is done with the graph -----------------------------------------------------------------


@condition
def retain_graph(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.3), nn.Tanh()) for _ in range(4)]), case.input()
    loss = case.loss(case.call(stack, x))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *gradients(stack)]


@condition
def several_forwards_first(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.3), nn.Tanh()) for _ in range(4)]), case.input()
    losses = [case.loss(case.call(stack, x * k)) for k in (1.0, 2.0, 3.0)]
    for loss in (losses[1], losses[0], losses[2]):
        loss.backward()
    return [x.grad, *gradients(stack)]


@condition
def stack_applied_twice(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(3), case.input()
    y = case.call(stack, case.call(stack, x))
    case.loss(y).backward()
    return [y, x.grad, *gradients(stack)]


@condition
def weights_shared_between_stacks(case: Case) -> list[Tensor | None]:
    block = case.block(nn.Tanh())
    first, second, x = case.stack(block, block), case.stack(block, case.block(nn.Tanh())), case.input()
    y = case.call(second, case.call(first, x).tanh())
    case.loss(y).backward()
    return [y, x.grad, *gradients(first), *gradients(second)]


@condition
def grad_of_input_only(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    return [*torch.autograd.grad(case.loss(case.call(stack, x)), x), *gradients(stack)]


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
    return [grad, x.grad, *gradients(stack)]


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
    return [y, x.grad, *gradients(stack), *seen]


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
    return [y, x.grad, *gradients(stack)]


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


# --- treatments ---------------------------------------------------------------------------------


def _parts(case: Case) -> list[nn.Module]:
    return [case.block(nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Tanh()) for _ in range(6)]


@condition
def last_blocks_stored(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), store_last=2))


@condition
def all_blocks_stored(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), store_last=6))


@condition
def all_blocks_checkpointed(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), treatments=["checkpoint"] * 6))


@condition
def flags_that_checkpointed_blocks_change_for_good(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[Settles(case) for _ in range(3)], treatments=["checkpoint", "selective", "reversible"])
    return [*case.train(stack), *case.train(stack)]


@condition
def treatments_mixed(case: Case) -> list[Tensor | None]:
    mixed = ["reversible", "checkpoint", "reversible", "reversible", "store", "reversible"]
    return case.train(case.stack(*_parts(case), treatments=mixed))


@condition
def treatments_mixed_on_duplicated_input(case: Case) -> list[Tensor | None]:
    mixed = ["store", "reversible", "reversible", "checkpoint", "reversible", "checkpoint"]
    return case.train(case.stack(*_parts(case), treatments=mixed, split_dim=None), case.input(width=WIDTH))


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


@condition
def selective_policy(case: Case) -> list[Tensor | None]:
    mixed = ["reversible"] * 3 + ["checkpoint"] + ["reversible"] * 2
    return case.train(case.stack(*_parts(case), treatments=mixed, context_fn=_keep_products))


@condition
def all_blocks_selective(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), treatments=["selective"] * 6))


class ChangesProducts(nn.Module):
    """Changes the outputs of what selective checkpointing keeps, in place, and views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).view(-1, 2 * WIDTH)
        a, b = h.sub_(1).sigmoid_().view(*x.shape[:-1], 2 * WIDTH).chunk(2, -1)
        return self.outer(a * b).mul_(0.5).tanh_()


@condition
def selective_where_products_change_in_place(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(ChangesProducts()) for _ in range(3)], treatments=["selective"] * 3))


@condition
def selective_twice(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*_parts(case), treatments=["selective"] * 6), case.input()
    loss = case.loss(case.call(stack, x))
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *gradients(stack)]


@condition
def memory_budget(case: Case) -> list[Tensor | None]:
    stack = case.stack(*_parts(case), memory_budget=0.9)
    return [*case.train(stack), *case.train(stack)]  # the first measures, the second follows the plan


# --- copies --------------------------------------------------------------------------------------


@condition
def deep_copy(case: Case) -> list[Tensor | None]:
    stack = case.mlp(3)
    case.train(stack)
    stack.zero_grad()
    return case.train(copy.deepcopy(stack))


@condition
def pickled(case: Case) -> list[Tensor | None]:
    stack, file = case.mlp(3), io.BytesIO()
    case.train(stack)
    torch.save(stack, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.zero_grad()
    return case.train(again)


@condition
def no_grad_between(case: Case) -> list[Tensor | None]:
    stack = case.mlp(3)
    with torch.no_grad():
        plain = case.call(stack, case.input())
    with torch.inference_mode():
        case.call(stack, case.input())
    return [plain, *case.train(stack)]
