"""Steps done chunk by chunk: the same function and gradients, and less held in backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.bench.measure import counts


def mlp(width: int = 8, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
    )


def train(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    leaf = x.detach().requires_grad_()
    y = stack(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *stack.parameters()])]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("coupling", [c for c in revlib.COUPLINGS if c not in ("affine", "bdia")])
@pytest.mark.parametrize("chunks", [2, 3, 7, [1, 4]])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_gradients_are_those_of_the_whole(coupling: str, chunks: Any, dim: int) -> None:
    blocks = [mlp().double() for _ in range(4)]
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    whole = revlib.CoupledSequential(*blocks, split_dim=2, coupling=coupling)
    options: dict[str, Any] = {"split_dim": 2, "coupling": coupling, "chunks": chunks, "chunk_dim": dim}
    expected = train(whole, x)
    assert same(train(revlib.ReversibleSequential(*blocks, **options), x), expected)
    assert same(train(revlib.CoupledSequential(*blocks, **options), x), expected)


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective", "store"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_numbers_and_treatments(treatment: Any, dropout: float) -> None:
    blocks = [mlp(dropout=dropout).double() for _ in range(4)]
    x = torch.randn(6, 16, dtype=torch.float64)
    stack = revlib.ReversibleSequential(*blocks, chunks=3, treatments=[treatment] * 4)
    expected = train(revlib.CoupledSequential(*blocks, chunks=3), x)
    for _ in range(2):  # the first forward does not expect draws
        assert same(train(stack, x), expected)


def test_bdia_and_the_grid_to_the_last_bit() -> None:
    blocks = [mlp() for _ in range(12)]
    x = torch.randn(6, 16)
    options: dict[str, Any] = {"coupling": "bdia", "grid_bits": 12, "chunks": 4}
    ours = train(revlib.ReversibleSequential(*blocks, **options), x)
    theirs = train(revlib.CoupledSequential(*blocks, **options), x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_affine() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)).double() for _ in range(3)]
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = train(revlib.CoupledSequential(*blocks, coupling="affine"), x)
    assert same(train(revlib.ReversibleSequential(*blocks, coupling="affine", chunks=2), x), expected)


def test_several_backwards_double_backward_and_inputs_alone() -> None:
    blocks = [mlp().double() for _ in range(3)]
    stack, plain = revlib.ReversibleSequential(*blocks, chunks=2), revlib.CoupledSequential(*blocks)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for each in (stack, plain):
        y = each(x).square().sum()
        first = torch.autograd.grad(y, x, retain_graph=True)
        second = torch.autograd.grad(y, [x, *each.parameters()], create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), [x, *each.parameters()], allow_unused=True)
        results.append([*first, *second, *[g for g in third if g is not None]])
    assert same(*results)
    assert torch.autograd.gradcheck(stack, x)


def test_part_of_the_graph_of_the_chunks() -> None:
    blocks = [mlp().double() for _ in range(3)]
    stack, plain = revlib.ReversibleSequential(*blocks, chunks=3), revlib.CoupledSequential(*blocks)
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    for rows in (slice(0, 2), slice(3, 4), slice(5, 6)):
        ours, theirs = (torch.autograd.grad(s(x)[rows].square().sum(), [x, *s.parameters()]) for s in (stack, plain))
        assert same(list(ours), list(theirs))


def test_frozen_blocks_and_no_gradient_for_the_input() -> None:
    blocks = [mlp().double() for _ in range(4)]
    blocks[1].requires_grad_(False)
    x = torch.randn(6, 16, dtype=torch.float64)
    grads = []
    for stack in (revlib.ReversibleSequential(*blocks, chunks=2), revlib.CoupledSequential(*blocks)):
        stack.zero_grad()
        stack(x).square().sum().backward()
        grads.append([p.grad.clone() for p in stack.parameters() if p.grad is not None])
    assert same(*grads)


def test_inverse_with_store_last_and_an_invertible_step() -> None:
    stack = revlib.ReversibleSequential(mlp(), revlib.Permutation(8), mlp(), chunks=2, store_last=1).double()
    x = torch.randn(6, 16, dtype=torch.float64)
    plain = revlib.CoupledSequential(*stack)
    assert torch.allclose(stack.inverse(stack(x)), x, rtol=1e-10)
    assert same(train(stack, x), train(plain, x))


def test_branches_whose_feed_forward_takes_no_mask() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), mlp()

        def attend(self, x: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
            return out

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x + self.attend(x, mask)
            return x + self.mlp(x)

    blocks = [Block().double() for _ in range(2)]
    options: dict[str, Any] = {"split_dim": 2, "branches": [["attend"], ["mlp"]]}
    x, mask = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True), torch.zeros(6, 6, dtype=torch.float64)
    ours = revlib.ReversibleSequential(*blocks, **options, chunks=[1, 3], chunk_dim=1)(x, mask)
    theirs = revlib.CoupledSequential(*blocks, **options)(x, mask)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert torch.allclose(*grads, rtol=1e-11)
    with pytest.raises(ValueError, match=r"chunks=2: stack.0.attend .* shape \[6, 6\] besides its stream.*chunks=1"):
        revlib.ReversibleSequential(*blocks, **options, chunks=2)(x, mask)


def test_peak_falls_with_the_number_of_chunks_and_flops_stay() -> None:
    def measured(**options: Any) -> tuple[float, float, int]:
        stack = revlib.ReversibleSequential(*[mlp(32) for _ in range(6)], **options)
        held, peak, output, flops, _ = counts(stack, torch.randn(2048, 64, requires_grad=True))
        return held / output, peak / output, flops

    whole, halves, eighths = measured(), measured(chunks=2), measured(chunks=8)
    assert [round(m[0], 1) for m in (whole, halves, eighths)] == [1.0, 1.0, 1.0]
    assert halves[1] < 0.8 * whole[1] and eighths[1] < 0.62 * whole[1]
    assert whole[2] == halves[2] == eighths[2]


def test_a_memory_budget_measures_chunks() -> None:
    blocks = [mlp(32) for _ in range(4)]
    x = torch.randn(2048, 64, requires_grad=True)
    peaks = []
    for options in ({}, {"chunks": 4}):
        stack = revlib.ReversibleSequential(*copy.deepcopy(blocks), memory_budget="100MB", **options)  # type: ignore[arg-type]
        stack(x)
        assert stack.plan is not None
        peaks.append(counts(stack, x)[1])
    assert peaks[0] > 0 and peaks[1] > 0


def test_compiled() -> None:
    blocks = [mlp().double() for _ in range(2)]
    stack = revlib.ReversibleSequential(*blocks, chunks=2)
    x = torch.randn(6, 16, dtype=torch.float64)
    assert same(train(torch.compile(stack, backend="aot_eager"), x), train(revlib.CoupledSequential(*blocks), x))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 0}, r"chunks=0: pass how many chunks"),
        ({"chunks": []}, r"chunks=\[\]: pass how many"),
        ({"chunks": "two"}, r"chunks='two': pass how many"),
        ({"chunks": 2, "chunk_dim": 1.5}, r"chunk_dim=1.5: pass the dimension"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        revlib.ReversibleSequential(mlp(), **options)


def test_errors_name_the_block_and_the_way_out() -> None:
    norms = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"chunks=2: 1.1 \(BatchNorm1d\) takes its statistics over the whole batch"):
        revlib.ReversibleSequential(mlp(), norms, chunks=2)
    revlib.ReversibleSequential(mlp(), norms, chunks=[2, 1])
    with pytest.raises(ValueError, match=r"chunk_dim=2 is out of range for streams of shape \[4, 8\]"):
        revlib.ReversibleSequential(mlp(), chunks=2, chunk_dim=2)(torch.randn(4, 16))

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.sum()

    with pytest.raises(TypeError, match=r"chunks=2: stack.0 \(Two\) returned more than a tensor"):
        revlib.ReversibleSequential(Two(8, 8), chunks=2)(torch.randn(4, 16))


def test_swap_takes_them() -> None:
    model = nn.Sequential(nn.Linear(16, 16), revlib.CoupledSequential(*[mlp() for _ in range(3)]))
    x = torch.randn(6, 16)
    expected = train(model, x)
    revlib.swap(model, {"1": {"chunks": 3}})
    assert model[1].chunks == (3,)
    for a, b in zip(train(model, x), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_fewer_samples_than_chunks(batch: int) -> None:
    blocks = [mlp().double() for _ in range(3)]
    x = torch.randn(batch, 16, dtype=torch.float64)
    assert same(train(revlib.ReversibleSequential(*blocks, chunks=4), x), train(revlib.CoupledSequential(*blocks), x))


def test_residual_blocks_and_a_list_of_layers() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double() for _ in range(3)]
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    expected = train(revlib.CoupledSequential(*layers, split_dim=None, residual=True), x)
    assert same(train(revlib.ReversibleSequential(*layers, split_dim=None, residual=True, chunks=3), x), expected)

    class Loop(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.layers = revlib.ReversibleModuleList(copy.deepcopy(layers), residual=True, **options)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert same(train(Loop(chunks=3), x), train(Loop(store_last=3), x))


def test_a_slice_and_a_copy_keep_them() -> None:
    stack = revlib.ReversibleSequential(*[mlp() for _ in range(4)], chunks=[1, 2])
    assert stack[1:].chunks == (2, 1, 2) and copy.deepcopy(stack).chunks == (1, 2)
    x = torch.randn(4, 16)
    assert torch.allclose(copy.deepcopy(stack)(x), stack(x), atol=1e-6)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.s(x), self.t(x)], 1)


def test_the_inverse_of_steps_in_chunks() -> None:
    blocks = [Doubled() for _ in range(3)]
    stack = revlib.CoupledSequential(*blocks, split_dim=-1, coupling="affine", chunks=[1, 2], chunk_dim=1)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    assert torch.allclose(stack.inverse(stack(x)), x)
