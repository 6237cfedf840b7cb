"""Attention among tokens with equal hashes, over a whole sequence, at a cost linear in its length.

    hash(x) = argmax [x R; -x R], R random        in each round; tokens are sorted by (hash, position)
    s_ij    = q_i . k_j / sqrt(d), k_j = q_j / |q_j|    for j in i's chunk of the sorted tokens, or in the chunk before
    out_i   = sum_rj exp(s_ij) v_j / sum_rj exp(s_ij)   over the rounds r and their j

Reformer: The Efficient Transformer, https://arxiv.org/abs/2001.04451, section 2 and appendix A.

NOTE [ LSH attention's speed ]
Times are of forward and backward on (4, 1024, 256), 8 heads, 4 hashes, one core, as in `revlib bench study=attention`.
1. Scores are computed for `PIECE` numbers at a time and changed in place, so that autograd keeps the exponentials only:
   0.41 s and a peak of 242 MiB, instead of 0.71 s and 377 MiB with all scores at once.
2. A penalty for forbidden keys is computed as a number and subtracted. A comparison with `masked_fill` takes ten times
   as long.
3. exp2, with log2(e) multiplied into the queries, takes a third of exp's time. Unlike exp, it is no slower where it
   underflows, as it does for each forbidden key.
4. A round returns its numerator and its denominator, relative to its largest score. Joining the rounds rescales two
   small tensors, and autograd derives the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SELF, NEVER = 1e5, 1e7  # penalty of a token's score for itself, and the least penalty of a forbidden key
OUTSIDE = 2.0**23  # the position of padding
PIECE = {"cpu": 2**19}  # number of scores that are computed at a time, see the NOTE
LARGE_PIECE = 2**26  # the same on other devices, on which a kernel's start takes longer than its work on a small piece


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    hashes: int = 4,
    chunk: int = 64,
    buckets: int | Sequence[int] | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    within_bucket: bool = False,
    duplicates: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Return attention (B, N, H, e) of each token to tokens that are like it, and to itself only if there is no other.

    >>> x = torch.randn(2, 4096, 8, 32)
    >>> y = lsh_attention(x, x, hashes=4, chunk=64)

    Rotations are drawn from torch's generator, and the same state of the generator gives the same output.

    Args:
        qk: queries, and keys when normalised, (B, N, H, d).
        v: values (B, N, H, e).
        hashes: number of rounds. More rounds cost more and miss fewer keys.
        chunk: number of tokens in a chunk.
        buckets: number of values of a hash, which is even; or several numbers, whose product counts. Several are
            cheaper if there are many buckets. By default two buckets for each chunk, in two factors above 64.
        causal: no token sees a later one.
        mask: (B, N), False for padding, which no token sees.
        within_bucket: a token sees only tokens with the same hash, not all that are near in the sorted order.
        duplicates: a key that is found in several rounds counts several times; if False once, as in the paper.
        dropout: the probability with which a weight is left out.
    """
    b, n, h, d = qk.shape
    if pad := -n % chunk:
        mask = F.pad(qk.new_ones(b, n, dtype=torch.bool) if mask is None else mask, (0, pad))
        qk, v = F.pad(qk, (0, 0, 0, 0, 0, pad)), F.pad(v, (0, 0, 0, 0, 0, pad))
    size, rows = n + pad, b * h * hashes
    with torch.no_grad():
        hashed = hash_tokens(qk, hashes, factors(buckets, size // chunk))  # (B, H, R, N)
        if mask is not None:
            hashed = hashed.masked_fill_(~mask[:, None, None], 2**24)  # padding is sorted to the end
        bucket, order = hashed.sort(dim=-1, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=qk.device).expand_as(order))
        position = order.to(exact := torch.promote_types(qk.dtype, torch.float32))
        if mask is not None:
            position.masked_fill_(bucket == 2**24, OUTSIDE)
        sides = [position, *([bucket.to(exact)] if within_bucket else [])]
        if not duplicates and hashes > 1:  # each sorted token's chunk, and bucket, in all rounds
            for code in (place // chunk, *([hashed] if within_bucket else [])):
                everywhere = code.unsqueeze(2).expand(-1, -1, hashes, -1, -1)
                sides.append(everywhere.gather(-1, order.unsqueeze(3).expand_as(everywhere)).to(exact))
        sides = [t.reshape(rows, -1, size // chunk, chunk) for t in sides]
        sequence = torch.arange(b * h, device=qk.device).view(b, h, 1, 1)
        there = (order * h + sequence % h + sequence // h * (size * h)).flatten()  # (B, H, R, N) -> (B N H)
        back = place + torch.arange(rows, device=qk.device).view(b, h, hashes, 1) * size
        back = back.permute(2, 0, 3, 1).flatten()  # (R, B, N, H) -> (B H R N)

    q = (qk * (d**-0.5 / math.log(2))).reshape(-1, d).index_select(0, there)
    kv = torch.cat((as_keys(qk), v), -1).reshape(b * size * h, -1).index_select(0, there)
    step = max(1, PIECE.get(qk.device.type, LARGE_PIECE) // (2 * size * chunk))
    q, kv = (t.view(rows, size // chunk, chunk, -1) for t in (q, kv))
    sums, tops = zip(
        *[
            _attend(q_piece, kv_piece, piece, causal, within_bucket, dropout)
            for q_piece, kv_piece, *piece in zip(*(t.split(step) for t in (q, kv, *sides)), strict=True)
        ],
        strict=True,
    )
    total = torch.cat(sums).flatten(0, -2).index_select(0, back).view(hashes, b, size, h, -1)
    if hashes > 1:
        top = torch.cat(tops).flatten().index_select(0, back).view(hashes, b, size, h, 1)
        total = total * (top - top.amax(0)).exp2()
    total = total.sum(0)[:, :n]
    numerator, denominator = total.split((total.shape[-1] - 1, 1), -1)
    return (numerator / denominator).to(v.dtype)


def as_keys(q: Tensor) -> Tensor:
    """Return queries as keys, which have length one."""
    return F.normalize(q, dim=-1, eps=1e-6)  # the default eps is zero in float16


def _attend(
    q: Tensor, kv: Tensor, sides: Sequence[Tensor], causal: bool, within_bucket: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return numerators and denominator (P C, m, e + 1) and top scores (P C, m, 1) of rows (P, C, m, ...)."""
    d, e = q.shape[-1], kv.shape[-1] - q.shape[-1]
    keys, values = _with_previous(kv).flatten(0, 1).split((d, e), -1)  # (P C, 2 m, .)
    scores = torch.bmm(q.flatten(0, 1), keys.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    with torch.no_grad():
        penalty = _penalty(sides, causal, within_bucket).flatten(0, 1)
    scores.sub_(penalty, alpha=NEVER)
    top = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    kept = F.dropout(weights, dropout) if dropout else weights
    return torch.cat((torch.bmm(kept.to(kv.dtype), values), weights.sum(-1, keepdim=True)), -1), top


def _penalty(sides: Sequence[Tensor], causal: bool, within_bucket: bool) -> Tensor:
    """Return the penalty of scores (P, C, m, 2 m) in units of NEVER: 1 or more for forbidden keys."""
    position, *codes = (t.unbind(1) for t in sides)
    (pos,) = position
    penalty = _difference(pos, OUTSIDE, last=None if causal else OUTSIDE - 1).neg_().clamp_(min=0)
    if within_bucket:
        penalty += _difference(codes.pop(0)[0]).abs_()
    if codes:  # a key's weight is divided by the number of rounds in which the query sees the key
        count = torch.zeros_like(penalty)
        for chunk, *bucket in zip(*codes, strict=True):
            seen = _difference(chunk).sub_(0.5).abs_().neg_().add_(1.5).clamp_(0, 1)  # 1 for a difference of 0 or 1
            for code in bucket:
                seen *= _difference(code).abs_().neg_().add_(1).clamp_(min=0)
            count += seen
        penalty.add_(count.clamp_(min=1).log2_(), alpha=1 / NEVER)
    penalty[..., pos.shape[-1] :].diagonal(dim1=-2, dim2=-1).fill_(SELF / NEVER)
    return penalty


def _difference(x: Tensor, first: float | None = None, last: float | None = None) -> Tensor:
    """Return x of the query minus x of the key: (P, C, m) -> (P, C, m, 2 m)."""
    query = x if last is None else torch.full_like(x, last)
    return query.unsqueeze(-1) - _with_previous(x, first).unsqueeze(-2)


def _with_previous(x: Tensor, first: float | None = None) -> Tensor:
    """Join each chunk (P, C, m, ...) with the one before, (P, C, 2 m, ...); the first with the last or `first`."""
    before = x.roll(1, 1)
    if first is not None:
        before[:, 0] = first
    return torch.cat((before, x), 2)


def hash_tokens(x: Tensor, hashes: int, sizes: Sequence[int]) -> Tensor:
    """Return bucket numbers (B, H, R, N) of x (B, N, H, d), with new rotations for each head and round."""
    b, n, h, d = x.shape
    drawn = torch.promote_types(x.dtype, torch.float32)  # so that half precision draws the same numbers
    rotations = [torch.randn(h, d, hashes * size // 2, device=x.device, dtype=drawn).to(x.dtype) for size in sizes]
    step = max(1, PIECE.get(x.device.type, LARGE_PIECE) // (h * hashes * max(sizes)))
    pieces = []
    for part in x.flatten(0, 1).transpose(0, 1).split(step, 1):  # (H, tokens, d)
        number = torch.zeros((), dtype=torch.long, device=x.device)
        for rotation, size in zip(rotations, sizes, strict=True):
            y = (part @ rotation).unflatten(-1, (hashes, size // 2))
            at = y.abs().argmax(-1, keepdim=True)
            number = number * size + (at + (y.gather(-1, at) < 0) * (size // 2)).squeeze(-1)
        pieces.append(number)
    return torch.cat(pieces, 1).view(h, b, n, hashes).permute(1, 0, 3, 2).contiguous()


def factors(buckets: int | Sequence[int] | None, chunks: int) -> list[int]:
    """Return the factors of the number of buckets; ValueError for a factor that is not even."""
    if buckets is None:
        if 2 * chunks <= 64:
            return [2 * chunks]
        one = 2 * math.ceil(math.sqrt(2 * chunks) / 2)
        return [one, 2 * math.ceil(chunks / one)]
    sizes = [buckets] if isinstance(buckets, int) else list(buckets)
    if not sizes or any(not isinstance(size, int) or size < 2 or size % 2 for size in sizes):
        raise ValueError(
            f"buckets={buckets!r}: a hash is one of x R and its negative; pass an even number, or a list of such"
        )
    return sizes
