"""Attention of the Reformer, compared in float64 with loops over tokens that follow the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_revlib import MemoryMeter
from lightning_revlib.recipes.models import lsh as lsh_module
from lightning_revlib.recipes.models.attention import FullAttention, LocalAttention, LSHAttention
from lightning_revlib.recipes.models.lsh import factors, hash_tokens, lsh_attention

SWITCHES = [
    {"causal": causal, "within_bucket": within, "duplicates": duplicates}
    for causal in (True, False)
    for within in (True, False)
    for duplicates in (True, False)
]


def draw(b=2, n=96, h=2, d=8, **options):
    return [torch.randn(b, n, h, d, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def by_definition(qk, v, hashes, chunk, buckets, causal, within_bucket, duplicates, mask=None):
    """Compute the weights of every pair of tokens in every round, in loops."""
    b, n, h, d = qk.shape
    codes = hash_tokens(qk.detach(), hashes, buckets)
    out = torch.empty_like(v)
    for i in range(b):
        for j in range(h):
            seen = torch.zeros(hashes, n, n, dtype=torch.bool)
            for r in range(hashes):
                code = codes[i, j, r].tolist()
                rank = {t: k for k, t in enumerate(sorted(range(n), key=lambda t: (code[t], t)))}
                for query in range(n):
                    for key in range(n):
                        seen[r, query, key] = (
                            0 <= rank[query] // chunk - rank[key] // chunk <= 1
                            and not (within_bucket and code[query] != code[key])
                            and not (causal and key > query)
                            and not (mask is not None and key != query and not mask[i, key])
                        )
            count = seen.sum(0).clamp(min=1) if not duplicates else torch.ones(n, n)
            count = count.double()
            scores = qk[i, :, j] @ F.normalize(qk[i, :, j], dim=-1).T / math.sqrt(d)
            scores = torch.where(torch.eye(n, dtype=torch.bool), scores - 1e5, scores) - count.log()
            weights = torch.where(seen, scores, -torch.inf).movedim(0, 1).flatten(1).softmax(-1)
            out[i, :, j] = weights.view(n, hashes, n).sum(1) @ v[i, :, j]
    return out


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_output_and_gradients_are_those_of_the_definition(switches):
    qk, v = draw(n=56)
    g = torch.randn_like(v)
    torch.manual_seed(1)
    expected = by_definition(qk, v, 3, 8, [8], **switches)
    torch.manual_seed(1)
    got = lsh_attention(qk, v, hashes=3, chunk=8, buckets=8, **switches)
    assert (got - expected).abs().max() < 1e-10
    wanted = torch.autograd.grad((expected * g).sum(), (qk, v))
    for one, other in zip(torch.autograd.grad((got * g).sum(), (qk, v)), wanted, strict=True):
        assert (one - other).abs().max() < 1e-9


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_padding_is_not_seen(switches):
    (qk, v), mask = draw(n=48), torch.rand(2, 48) < 0.7
    torch.manual_seed(1)
    got = lsh_attention(qk, v, hashes=2, chunk=16, buckets=4, mask=mask, **switches)
    for gradient in torch.autograd.grad(got[mask].sum(), (qk, v)):
        assert not gradient[~mask].any()
    changed = [torch.where(mask[..., None, None], t, torch.randn_like(t)) for t in (qk, v)]
    torch.manual_seed(1)
    again = lsh_attention(*changed, hashes=2, chunk=16, buckets=4, mask=mask, **switches)
    assert torch.equal(got[mask], again[mask]) and got.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("n", [64, 60, 32, 1])  # two chunks; padded; one chunk; one token
def test_with_one_bucket_it_is_full_attention(n, duplicates, causal, monkeypatch):
    monkeypatch.setattr(lsh_module, "hash_tokens", lambda x, hashes, _: x.new_zeros(2, 2, hashes, x.shape[1]).long())
    options = {"head_dim": 8, "causal": causal}
    chunk = 32 if causal else 64
    lsh = LSHAttention(16, 2, hashes=4, chunk=chunk, duplicates=duplicates, full_below=0, **options)
    full = FullAttention(16, 2, **options)
    full.load_state_dict(lsh.state_dict())
    x, g = torch.randn(2, n, 16), torch.randn(2, n, 16)
    one, other = (
        (*torch.autograd.grad(((y := m(x)) * g).sum(), list(m.parameters())), y.detach()) for m in (lsh, full)
    )
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp_min(1)


@pytest.mark.parametrize("make", [FullAttention, LocalAttention, LSHAttention])
def test_no_gradient_comes_from_later_tokens(make):
    """Look at gradients, since a perturbation moves the boundaries of chunks for earlier tokens as well."""
    attention = make(16, 2, **({} if make is FullAttention else {"chunk": 16}))
    x = torch.randn(2, 100, 16, requires_grad=True)
    y = attention(x)
    for t in (0, 1, 15, 16, 50, 98):
        (gradient,) = torch.autograd.grad(y[:, : t + 1].sum(), x, retain_graph=True)
        assert not gradient[:, t + 1 :].any() and gradient[:, : t + 1].any()


def test_the_same_random_state_gives_the_same_output_to_the_bit():
    attention, x = LSHAttention(16, 2, chunk=16, dropout=0.1), torch.randn(2, 100, 16)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(attention(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [64, 50, 5])
def test_local_attention_by_definition(n, causal):
    local, x, mask = (
        LocalAttention(16, 2, chunk=16, causal=causal).double(),
        torch.randn(2, n, 16).double(),
        torch.rand(2, n) < 0.8,
    )
    q, k, v = local.project(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
    at = torch.arange(n)
    distance = at[:, None] // 16 - at // 16
    seen = ((distance == 0) | (distance == 1)) & (at <= at[:, None]) if causal else distance.abs() <= 1
    seen = (seen & mask[:, None]) | torch.eye(n, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, seen.unsqueeze(1))
    assert (local(x, mask=mask) - local.out(expected.transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_short_sequences_get_full_attention():
    lsh, x = LSHAttention(16, 2, chunk=16), torch.randn(1, 32, 16)
    assert torch.equal(lsh(x), lsh(x))
    assert not torch.equal(lsh(torch.cat((x, x), 1)), lsh(torch.cat((x, x), 1)))


def test_memory_is_linear_in_length():
    held = []
    for n in (8192, 16384, 24576):
        qk, v = (torch.randn(1, n, 2, 8, requires_grad=True) for _ in range(2))
        with MemoryMeter() as meter:
            lsh_attention(qk, v, hashes=2, chunk=32).sum().backward()
        held.append(meter.peak)
    more = [b - a for a, b in itertools.pairwise(held)]
    assert max(more) < 1.3 * min(more)


def test_hashes_use_all_buckets_alike_and_neighbours_share_them():
    x = torch.randn(1, 4000, 1, 16)
    near = x + 0.01 * torch.randn_like(x)
    for sizes in ([8], [4, 4], [2, 6]):
        counts = hash_tokens(x, 2, sizes).flatten().bincount(minlength=math.prod(sizes)) / 8000
        assert len(counts) == math.prod(sizes) and counts.min() > 0.3 / len(counts)
        torch.manual_seed(1)
        codes = hash_tokens(x, 2, sizes)
        torch.manual_seed(1)
        assert (codes == hash_tokens(near, 2, sizes)).float().mean() > 0.95


def test_buckets_are_two_for_each_chunk_in_factors_if_many():
    assert factors(None, 16) == [32]
    assert factors([4, 8], 1) == [4, 8] and factors(6, 1) == [6]
    for chunks in (33, 256, 1024, 5000):
        one, other = factors(None, chunks)
        assert one % 2 == other % 2 == 0 and 2 * chunks <= one * other < 2.5 * chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    attention, x = LSHAttention(16, 2, chunk=16), torch.randn(2, 100, 16)
    torch.manual_seed(1)
    expected = attention(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        assert (attention(x) - expected).norm() < 0.2 * expected.norm()  # some tokens change their buckets
    half = attention.to(dtype)
    for n in (100, 20):
        y = half(x[:, :n].to(dtype))
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_as_on_the_cpu(monkeypatch):
    def same_hashes(x, *args):
        torch.manual_seed(3)
        return hash_tokens(x.cpu(), *args).to(x.device)

    monkeypatch.setattr(lsh_module, "hash_tokens", same_hashes)
    lsh = LSHAttention(16, 2, chunk=16, buckets=2, full_below=0)
    x = torch.randn(2, 32, 16)
    assert torch.allclose(lsh(x), lsh.cuda()(x.cuda()).cpu(), atol=1e-5)
    long = torch.randn(2, 1000, 16, device="cuda", requires_grad=True)
    (gradient,) = torch.autograd.grad(lsh(long)[:, :501].sum(), long)
    assert not gradient[:, 501:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSHAttention(16, 3), "heads=3: a width of 16 cannot be shared equally"),
        (lambda: LSHAttention(16, 2, hashes=0), "hashes=0: pass 1 or more"),
        (lambda: LSHAttention(16, 2, buckets=7), "buckets=7: .* pass an even number"),
        (lambda: LSHAttention(16, 2, buckets=[4, 3]), r"buckets=\[4, 3\]"),
        (lambda: LocalAttention(16, 2, chunk=0), "chunk=0: pass 1 or more"),
        (lambda: LSHAttention(16, 2)(torch.randn(2, 8, 16), mask=torch.ones(2, 8)), "mask is torch.float32 of shape"),
        (
            lambda: LSHAttention(16, 2)(torch.randn(2, 8, 16), mask=torch.ones(2, 9) > 0),
            r"shape \[2, 9\]; pass .*\[2, 8\]",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
