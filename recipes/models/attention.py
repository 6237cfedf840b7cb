"""Attention of the Reformer: three modules from (B, N, dim) to (B, N, out), by the tokens that a token sees.

    FullAttention     all tokens before it, at a cost that grows with the square of the length
    LocalAttention    its own chunk and the chunk before
    LSHAttention      tokens that are like it, by `lsh_attention`

In full and LSH attention, keys are the normalised queries, and both have the same parameters: a model trained with one
can be run with the other. Reformer, https://arxiv.org/abs/2001.04451.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_revlib.recipes.models.lsh import SELF, as_keys, factors, lsh_attention


class Attention(nn.Module):
    """Base of all attention modules, with projections before and after.

    Args:
        dim: width of the input.
        heads: number of heads.
        head_dim: width of a head; default dim / heads.
        out: width of the output; default dim.
        causal: no token sees a later one.
        dropout: the probability with which an attention weight is left out.

    Raises:
        ValueError: if `dim` cannot be shared among the heads.
    """

    inputs = 2  # number of projections: shared queries and keys, and values

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        out: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"heads={heads}: a width of {dim} cannot be shared equally; set head_dim or other heads")
        width = heads * (head_dim or dim // heads)
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.project = nn.Linear(dim, self.inputs * width, bias=False)
        self.out = nn.Linear(width, out or dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, N, dim) to (B, N, out); `mask` (B, N) is False for padding, which no token sees."""
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {mask.dtype} of shape {list(mask.shape)}; pass torch.bool of shape {list(x.shape[:2])},"
                " False for padding"
            )
        heads = self.project(x).unflatten(-1, (self.inputs, self.heads, -1)).unbind(2)  # each (B, N, H, d)
        return self.out(self.attend(*heads, mask=mask).flatten(2))

    def attend(self, *heads: Tensor, mask: Tensor | None) -> Tensor:
        """Map `inputs` tensors of (B, N, H, d) to (B, N, H, d); a subclass defines it."""
        raise NotImplementedError

    @property
    def dropped(self) -> float:
        """Return the probability of dropout in the current mode."""
        return self.dropout if self.training else 0.0


class FullAttention(Attention):
    """Attention in which a token sees all tokens before it, and itself only if there is no other.

    >>> FullAttention(64, heads=4)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])

    Not for long sequences: time and memory grow with the square of the length.
    """

    def attend(self, *heads: Tensor, mask: Tensor | None) -> Tensor:
        qk, v = heads
        n = qk.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool, device=qk.device)
        allowed = (allowed.tril() if self.causal else allowed).expand(1, 1, n, n)
        if mask is not None:
            allowed = allowed & mask[:, None, None]
        bias = qk.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        bias.diagonal(dim1=-2, dim2=-1).fill_(-min(SELF, torch.finfo(bias.dtype).max / 2))
        q, k, v = (t.transpose(1, 2) for t in (qk, as_keys(qk), v))
        return F.scaled_dot_product_attention(q, k, v, bias, self.dropped).transpose(1, 2)


class LSHAttention(FullAttention):
    """Attention in which a token sees tokens that are like it.

    See `lsh_attention` for `hashes`, `buckets`, `within_bucket` and `duplicates`.

    >>> LSHAttention(64, heads=4, hashes=2)(torch.randn(2, 1000, 64)).shape
    torch.Size([2, 1000, 64])

    Args:
        full_below: sequences up to this length get full attention, which is faster for short sequences and misses no
            token; default two chunks.
        **options: of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        hashes: int = 4,
        chunk: int = 64,
        buckets: int | Sequence[int] | None = None,
        within_bucket: bool = False,
        duplicates: bool = True,
        full_below: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        for name, value in (("hashes", hashes), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value}: pass 1 or more")
        factors(buckets, 1)
        self.hashes, self.chunk, self.buckets = hashes, chunk, buckets
        self.within_bucket, self.duplicates = within_bucket, duplicates
        self.full_below = 2 * chunk if full_below is None else full_below

    def attend(self, *heads: Tensor, mask: Tensor | None) -> Tensor:
        if heads[0].shape[1] <= self.full_below:
            return super().attend(*heads, mask=mask)
        return lsh_attention(
            *heads,
            hashes=self.hashes,
            chunk=self.chunk,
            buckets=self.buckets,
            causal=self.causal,
            mask=mask,
            within_bucket=self.within_bucket,
            duplicates=self.duplicates,
            dropout=self.dropped,
        )


class LocalAttention(Attention):
    """Attention in which a token sees its own chunk and the one before, by separate queries and keys.

    >>> LocalAttention(64, heads=4, chunk=32)(torch.randn(2, 1000, 64)).shape
    torch.Size([2, 1000, 64])

    Args:
        chunk: number of tokens in a chunk; without `causal`, a token sees the chunk after as well.
        **options: of `Attention`.
    """

    inputs = 3

    def __init__(self, dim: int, heads: int = 8, *, chunk: int = 64, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: pass 1 or more")
        self.chunk = chunk

    def attend(self, *heads: Tensor, mask: Tensor | None) -> Tensor:
        b, n, h, _ = heads[0].shape
        pad, m = -n % self.chunk, self.chunk
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, m)) for t in heads)  # (B, C, m, H, d)
        chunks, reach = q.shape[1], (1, 0) if self.causal else (1, 1)
        own = torch.arange(1, n + pad + 1, device=q.device).view(1, chunks, m, 1)
        real = own <= n if mask is None else F.pad(mask, (0, pad)).view(b, chunks, m, 1)
        at, real = (_neighbours(t, reach).transpose(2, 3) for t in (own, real))  # (., C, 1, w); zero outside
        allowed = (real & (at <= own if self.causal else at > 0)) | (at == own)  # a softmax needs a key: itself
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, _neighbours(k, reach), _neighbours(v, reach)))
        allowed = allowed.expand(b, -1, -1, -1).flatten(0, 1).unsqueeze(1)  # (B C, 1, m, w)
        y = F.scaled_dot_product_attention(q, k, v, allowed, self.dropped)
        return y.transpose(1, 2).reshape(b, n + pad, h, -1)[:, :n]


def _neighbours(x: Tensor, reach: tuple[int, int]) -> Tensor:
    """Join chunks (B, C, m, ...) with the chunks before and after, zeros outside, to (B, C, w, ...)."""
    before, after = reach
    around = F.pad(x, (0, 0) * (x.ndim - 2) + (before, after))
    return torch.cat([around[:, i : i + x.shape[1]] for i in range(1 + before + after)], 2)
