from __future__ import annotations

import warnings

import torch
from torch import nn

import lightning_revlib as revlib


def test_counts_storages_not_views() -> None:
    x = torch.ones(100)
    with revlib.MemoryMeter() as meter:
        y = x * 2
        z = y[:50].view(5, 10)
        assert meter.live == 400
        w = y + 1
        assert meter.live == 800
        del w
        assert (meter.live, meter.peak) == (400, 800)
        meter.reset_peak()
        del y
        assert (meter.live, meter.peak) == (400, 400)
        del z
    assert meter.live == 0


def test_what_was_alive_before_does_not_count() -> None:
    x = torch.ones(100)
    with revlib.MemoryMeter() as meter:
        x.add_(1)
        x.view(10, 10)
        assert meter.live == 0


def test_repeats_to_the_byte_and_forgets_gradients() -> None:
    layer, x, figures = nn.Linear(8, 8), torch.randn(4, 8), []
    for _ in range(2):
        layer.zero_grad()
        with revlib.MemoryMeter() as meter:
            hooks = [p.register_post_accumulate_grad_hook(meter.forget_gradient) for p in layer.parameters()]
            layer(x).tanh().sum().backward()
            figures.append((meter.live, meter.peak))
        for hook in hooks:
            hook.remove()
    assert figures[0] == figures[1]
    assert figures[0][0] == 0


def test_sparse_tensors_are_their_indices_and_values() -> None:
    embedding = nn.Embedding(50, 8, sparse=True)
    with revlib.MemoryMeter() as meter:
        hook = embedding.weight.register_post_accumulate_grad_hook(meter.forget_gradient)
        embedding(torch.arange(4)).sum().backward()
        assert embedding.weight.grad is not None and embedding.weight.grad.is_sparse
        assert meter.live == 0
        hook.remove()
        for layout in (torch.sparse_csr, torch.sparse_csc):
            matrix = torch.eye(10).to_sparse(layout=layout)
            assert meter.live >= 10 * 4 + (10 + 11) * 8  # values, indices, and where rows begin
            del matrix
            assert meter.live == 0


def test_operators_of_higher_order_are_one_operation() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings(), revlib.MemoryMeter() as meter:
        warnings.simplefilter("ignore")  # it is not compiled
        out = flex_attention(*[torch.ones(1, 2, 16, 16)] * 3)
    assert out.nbytes <= meter.live < 4 * out.nbytes  # type: ignore[union-attr]


def test_weights_that_fsdp_gathers_and_frees_by_resizing_them() -> None:
    from torch.distributed import fsdp  # noqa: F401  # has the operator

    gathered, weight = torch.ones(2, 50), torch.empty(100)
    weight.untyped_storage().resize_(0)
    with revlib.MemoryMeter() as meter:
        for _ in range(2):
            weight.untyped_storage().resize_(400)
            torch.ops.fsdp.split_with_sizes_copy(gathered, [50], dim=1, out=[weight.view(2, 50)])
            assert (meter.live, meter.peak) == (400, 400)
            weight.untyped_storage().resize_(0)
            assert meter.live == 0
            meter.reset_peak()
