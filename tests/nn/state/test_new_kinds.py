"""What a forward depends on besides its input: chosen kernels, plain attributes, function modes, the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample, twins
from tests.nn.test_matrix import errors

Around = Callable[[], AbstractContextManager[Any]]


def math_only() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def differentiate(run: Callable[[], Tensor], leaves: list[Tensor], order: int, forward: Around) -> list[Tensor | None]:
    """Return gradients of this order; the context is round the forward only."""
    torch.manual_seed(1)
    with forward():
        loss = run()
    if order == 1:
        return list(torch.autograd.grad(loss, leaves))
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)]


# --- kernels -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.out(y.transpose(-2, -3).flatten(-2))


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("order", [1, 2])
def test_attention_kernels_chosen_for_the_forward_only(order: int, treatment: Any) -> None:
    if order == 2 and treatment != "reversible":
        pytest.skip("torch's checkpoint and its selective policy are compared in the first order")
    blocks = [Attention().double() for _ in range(3)]
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    plain = revlib.CoupledSequential(*copy.deepcopy(blocks), split_dim=-1)
    stack = revlib.ReversibleSequential(*blocks, split_dim=-1, treatments=[treatment] * 3)
    with math_only():
        expected = differentiate(lambda: plain(x).square().sum(), [x, *plain.parameters()], order, nullcontext)
    found = differentiate(lambda: stack(x).square().sum(), [x, *stack.parameters()], order, math_only)
    assert max(errors(expected, found)) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_attention_kernels_of_a_swapped_gpt2(order: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    revlib.swap(model, {"transformer.h": {"coupling": "midpoint", "residual": True}})
    twin = copy.deepcopy(model)
    revlib.swap(twin, {"transformer.h": {"store_last": 3}})  # ordinary autograd of the same function
    ids = torch.randint(20, (2, 6))

    def loss(of: Any) -> Tensor:
        return of(ids, labels=ids, use_cache=False).loss

    with math_only():
        expected = differentiate(lambda: loss(twin), list(twin.parameters()), order, nullcontext)
    found = differentiate(lambda: loss(model), list(model.parameters()), order, math_only)
    assert max(errors(expected, found)) < 1e-12


FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    "memory-efficient attention": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
    "attention by matrix products": (cuda.math_sdp_enabled, cuda.enable_math_sdp, False),
    "mkldnn": (lambda: mkldnn.enabled, lambda value: setattr(mkldnn, "enabled", value), False),
    "cudnn": (lambda: cudnn.enabled, lambda value: setattr(cudnn, "enabled", value), False),
    "cudnn deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value), True),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
}


class Reads(nn.Module):
    """Notes a flag in each call."""

    def __init__(self, read: Callable[[], Any], seen: list[Any]) -> None:
        super().__init__()
        self.read, self.seen = read, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.read())
        return x.tanh()


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_that_choose_kernels_are_those_of_the_forward(flag: str, treatment: Any) -> None:
    read, write, value = FLAGS[flag]
    before, seen = read(), list[Any]()
    stack = revlib.ReversibleSequential(*[Reads(read, seen) for _ in range(3)], treatments=[treatment] * 3)
    for around_forward in (True, False):
        write(value if around_forward else before)
        try:
            y = stack(torch.randn(2, 8, requires_grad=True))
            write(before if around_forward else value)
            y.sum().backward()
            assert read() == (before if around_forward else value)
        finally:
            write(before)
        assert seen == [value if around_forward else before] * 6
        seen.clear()


# --- plain attributes ----------------------------------------------------------------------------


class ActNorm(nn.Module):
    """Sets its scale and bias from the first batch, and remembers that in a plain attribute."""

    def __init__(self, remembers: str = "bool") -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.initialised = {"bool": False, "int": 0, "None": None, "str": "no"}[remembers]
        self.then = {"bool": True, "int": 1, "None": "by the first batch", "str": "yes"}[remembers]

    def forward(self, x: Tensor) -> Tensor:
        if self.initialised != self.then:
            self.log_scale.data.copy_(-x.std(0).log())
            self.bias.data.copy_(-x.mean(0))
            self.initialised = self.then
        return self.linear((x + self.bias) * self.log_scale.exp()).tanh()


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("remembers", ["bool", "int", "None", "str"])
def test_data_dependent_initialisation_in_the_first_call(remembers: str, treatment: Any) -> None:
    stack, plain = twins(lambda: ActNorm(remembers), treatment)
    xs, found = [sample(), sample()], []
    for each in (plain, stack):
        losses = [each(x).square().sum() for x in xs]
        found.append(list(torch.autograd.grad(losses[0] + losses[1], [*xs, *each.parameters()])))
        found[-1] += [p.detach() for p in each.parameters()]
    assert max(errors(*found)) < 1e-12
    assert [m.initialised for m in stack] == [m.initialised for m in plain] == [stack[0].then] * 3  # type: ignore


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_data_dependent_initialisation_and_a_backward_at_a_time(treatment: Any) -> None:
    stack, plain = twins(ActNorm, treatment)
    x = sample()
    for _ in range(2):
        grads = [list(torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()])) for m in (plain, stack)]
        assert max(errors(*grads)) < 1e-12
    assert all(m.initialised for m in stack)


class Toggles(nn.Module):
    """Changes attributes of several kinds in each call, deletes one and adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.mode, self.memory = True, "sin", None
        self.inner = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(getattr(x, self.mode)() * (2 if self.even else 3)) + (
            0 if self.memory is None else self.memory
        )
        self.even, self.mode = not self.even, "cos" if self.mode == "sin" else "sin"
        self.memory = None if self.memory is not None else 0.5  # type: ignore[assignment]
        if hasattr(self.inner, "extra"):
            del self.inner.extra
            return out * 2
        self.inner.extra = True  # type: ignore[assignment]
        return out


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_attributes_of_all_plain_kinds(treatment: Any) -> None:
    stack, plain = twins(Toggles, treatment)
    x = sample()
    for _ in range(3):
        grads = [list(torch.autograd.grad(m(x).sum() * m(x).sum(), x)) for m in (plain, stack)]
        assert max(errors(*grads)) < 1e-12
        for m, other in zip(stack, plain, strict=True):
            assert (m.even, m.mode, m.memory) == (other.even, other.mode, other.memory)
            assert hasattr(m.inner, "extra") == hasattr(other.inner, "extra")
        plain(x), stack(x)


# --- function modes and the device ---------------------------------------------------------------


class Replaces(TorchFunctionMode):
    """Computes another function wherever a model calls GELU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].sigmoid() * args[0] * 2 if func is nn.functional.gelu else func(*args, **(kwargs or {}))


def with_gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()


@contextmanager
def two_modes() -> Iterator[None]:
    with Replaces(), torch.device("cpu"):
        yield


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("modes", [Replaces, two_modes])
@pytest.mark.parametrize("where", ["forward", "step", "backward"])
def test_a_function_mode(where: str, modes: Around, treatment: Any) -> None:
    stack, plain = twins(with_gelu, treatment)
    x, grads = sample(), []
    for each in (plain, stack):
        with modes() if where == "step" else nullcontext():
            with modes() if where == "forward" else nullcontext():
                loss = each(x).square().sum()
            with modes() if where == "backward" else nullcontext():
                each.zero_grad()
                x.grad = None
                loss.backward()
        grads.append([x.grad, *[p.grad for p in each.parameters()]])
    assert max(errors(*grads)) < 1e-12


class OnDevice(nn.Module):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.empty(1).device.type)
        return x.sin()


@pytest.mark.parametrize("how", ["context", "default"])
def test_the_default_device_round_the_whole_step(how: str) -> None:
    seen: list[str] = []
    stack = revlib.ReversibleSequential(*[OnDevice(seen) for _ in range(2)])
    x = torch.randn(2, 8, requires_grad=True)

    def step() -> None:
        if how == "default":
            torch.set_default_device("meta")
        with torch.device("meta") if how == "context" else nullcontext():
            stack(x).sum().backward(torch.ones((), device="cpu"))

    with ThreadPoolExecutor(1) as thread:  # the default is the thread's
        thread.submit(step).result()
    assert seen == ["meta"] * 4


class Own(nn.Module):
    """Calls batch_norm on buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("var", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)  # type: ignore[arg-type]


def test_statistics_of_a_stack_that_ran_on_the_meta_device_before() -> None:
    with torch.device("meta"):
        revlib.ReversibleSequential(Own(), Own())(torch.randn(8, 8, dtype=torch.float64, requires_grad=True))
    stack, plain = twins(Own, "reversible")
    x = sample()
    grads = [torch.autograd.grad(each(x).square().sum(), x)[0] for each in (stack, plain)]
    assert torch.allclose(*grads, rtol=1e-12)
    for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(b, other, rtol=1e-12)
