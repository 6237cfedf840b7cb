"""Reformer: a language model whose memory does not grow with its depth, nor with the square of its length.

    y1 = x1 + Attention(LayerNorm(x2)),  y2 = x2 + FeedForward(LayerNorm(y1))      one layer: two steps of the stack

Both streams start as the embedded tokens, as wide as the model. The head reads the mean of both.
Reformer: The Efficient Transformer, https://arxiv.org/abs/2001.04451.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_revlib.nn import CoupledSequential, get_coupling
from lightning_revlib.recipes.models.attention import Attention, FullAttention, LocalAttention, LSHAttention
from lightning_revlib.recipes.tasks.base import OptimizerFactory, SchedulerFactory
from lightning_revlib.recipes.tasks.language import LanguageModel

KINDS: dict[str, type[Attention]] = {"lsh": LSHAttention, "local": LocalAttention, "full": FullAttention}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Norm(nn.LayerNorm):
    """Layer normalisation; with `shift`, the second half of the channels come from the token before."""

    def __init__(self, width: int, shift: bool) -> None:
        super().__init__(width)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if not self.shift:
            return x
        own, other = x.tensor_split(2, -1)
        return torch.cat((own, F.pad(other[:, :-1], (0, 0, 1, 0))), -1)


class AttentionBlock(nn.Module):
    """Attention of the normalised stream."""

    def __init__(self, width: int, attention: Attention, *, shift: bool, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention, self.dropout = Norm(width, shift), attention, nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.dropout(self.attention(self.norm(x), mask))


class FeedForward(nn.Module):
    """Two layers that act on each token by itself, so that a stack can run them on chunks of the sequence."""

    def __init__(self, width: int, hidden: int, out: int, *, activation: str, shift: bool, dropout: float) -> None:
        super().__init__()
        self.norm = Norm(width, shift)
        self.body = nn.Sequential(
            nn.Linear(width, hidden),
            nn.Dropout(dropout),
            ACTIVATIONS[activation](),
            nn.Linear(hidden, out),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


class AxialPositions(nn.Module):
    """An embedding of a position's coordinates on a grid: 640 vectors for 65,536 positions.

    >>> AxialPositions([256, 256], [32, 32])(1000).shape
    torch.Size([1000, 64])
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.axes = nn.ParameterList(0.02 * torch.randn(size, dim) for size, dim in zip(shape, dims, strict=True))

    def forward(self, length: int) -> Tensor:
        """Return the embeddings of the first `length` positions, (length, sum of the axes' widths)."""
        grid = (-(-length // math.prod(self.shape[1:])), *self.shape[1:])  # the rows that the length needs
        parts = []
        for axis, weight in enumerate(self.axes):
            view = [1] * len(grid) + [weight.shape[1]]
            view[axis] = grid[axis]
            parts.append(weight[: grid[axis]].view(view).expand(*grid, -1))
        return torch.cat(parts, -1).flatten(0, -2)[:length]


class Reformer(nn.Module):
    """A causal language model: logits (B, N, vocab) of each of the tokens (B, N), given the tokens before it.

    >>> net = Reformer(length=1024, dim=128, depth=2)
    >>> logits = net(torch.randint(256, (2, 1024)))
    >>> text = net.generate(torch.tensor([list(b"import ")]), 100, temperature=0.8)

    Args:
        vocab: number of tokens.
        length: the longest sequence.
        dim: width of the model, and of each of its two streams.
        depth: layers.
        heads, head_dim: of the attention; default dim / heads.
        ff: width of the feed-forward's hidden layer; default 4 dim.
        ff_chunks: number of pieces of the sequence on which the feed-forward runs one after the other, so that backward
            holds one piece at a time; not with `shift`.
        activation: of the feed-forward, "relu" or "gelu".
        attention: the kinds of the layers in turn, "lsh", "local" or "full".
        lsh: options of `LSHAttention`, such as {"hashes": 4, "chunk": 64}.
        local: options of `LocalAttention`.
        axial: the grid of positions, whose product is at least `length`; by default one axis up to a length of 1,024,
            and two of about equal size above.
        axial_dims: the part of `dim` that each axis has; default equal parts.
        shift: half the channels of a block's input come from the token before. Not in the paper, but a small model
            learns in a third of the time; RWKV, https://arxiv.org/abs/2305.13048.
        dropout: probability for embeddings, feed-forward layers and the blocks' outputs.
        attention_dropout: probability for attention weights.
        tied: the last layer's weights are the embedding's.
        split_dim: None for the paper's two streams of the model's width; 2 for streams of half the width.
        coupling: of the streams: a name, or a mapping such as {"name": "momentum", "gamma": 0.9}.
        grid_bits: make the stack exact, see `CoupledSequential`; hashes in backward then equal those in forward.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        vocab: int = 256,
        length: int = 4096,
        *,
        dim: int = 256,
        depth: int = 6,
        heads: int = 8,
        head_dim: int | None = None,
        ff: int | None = None,
        ff_chunks: int = 1,
        activation: str = "gelu",
        attention: Sequence[str] = ("lsh",),
        lsh: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        axial: Sequence[int] | None = None,
        axial_dims: Sequence[int] | None = None,
        shift: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tied: bool = True,
        split_dim: int | None = None,
        coupling: str | Mapping[str, Any] = "additive",
        grid_bits: int | None = None,
    ) -> None:
        super().__init__()
        width = dim if _check_split_dim(split_dim, dim) is None else dim // 2
        out = _branch(coupling, width)
        _check(depth, activation, attention, ff_chunks, shift)
        if not isinstance(attention_dropout, (int, float)) or not 0 <= attention_dropout <= 1:
            raise ValueError(f"attention_dropout={attention_dropout!r}: pass a probability, from 0.0 to 1.0")
        self.vocab, self.length = vocab, length
        self.embedding = nn.Embedding(vocab, dim)
        self.positions = AxialPositions(*_grid(length, dim, axial, axial_dims))
        self.dropout = nn.Dropout(dropout)
        steps: list[nn.Module] = []
        for kind in islice(cycle(attention), depth):
            options = {"lsh": lsh, "local": local}.get(kind) or {}
            attend = KINDS[kind](width, heads, head_dim=head_dim, out=out, dropout=attention_dropout, **options)
            hidden = 4 * dim if ff is None else ff
            steps += [
                AttentionBlock(width, attend, shift=shift, dropout=dropout),
                FeedForward(width, hidden, out, activation=activation, shift=shift, dropout=dropout),
            ]
        self.stack = CoupledSequential(
            *steps, split_dim=split_dim, coupling=coupling, grid_bits=grid_bits, chunks=[1, ff_chunks], chunk_dim=1
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits of `tokens` (B, N), each from the tokens before; `mask` (B, N) is False for padding."""
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(
                f"tokens of shape {list(tokens.shape)}: pass (batch, length), the length from 1 to {self.length};"
                " make the model with a larger length for more"
            )
        x = F.pad(self.embedding(tokens[:, :-1]), (0, 0, 1, 0))  # the first token is predicted from zeros
        x = self.dropout(x + self.positions(tokens.shape[1]))
        shifted = None if mask is None else F.pad(mask[:, :-1], (1, 0), value=True)
        calls: list[Any] = [((), {"mask": shifted}), ((), {})]  # attention, feed-forward
        return self.head(self.norm(self.stack(x, layerwise=calls * (len(self.stack) // 2))))

    @contextmanager
    def hashing(self, hashes: int) -> Iterator[None]:
        """Run LSH attention with another number of rounds inside the context; 0 is full attention."""
        layers = [m for m in self.modules() if isinstance(m, LSHAttention)]
        before = [(m.hashes, m.full_below) for m in layers]
        for m in layers:
            m.hashes, m.full_below = (hashes, 0) if hashes else (m.hashes, self.length)
        try:
            yield
        finally:
            for m, options in zip(layers, before, strict=True):
                m.hashes, m.full_below = options

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, *, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Return `tokens` (B, N) and `count` more, each drawn from the model's distribution given the tokens before it.

        Args:
            tokens: the beginning, which may have no tokens.
            count: number of tokens to add.
            temperature: below 1 makes likely tokens likelier; 0 takes the likeliest token.
            top_k: draw among this number of the likeliest tokens only; None for all.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature}, top_k={top_k}: pass 0 or more, and 1 or more or None")
        training = self.training
        self.eval()
        try:
            for _ in range(count):
                seen = F.pad(tokens[:, -(self.length - 1) :] if self.length > 1 else tokens[:, :0], (0, 1))
                logits = self(seen)[:, -1]
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None:
                        least = logits.topk(min(top_k, self.vocab)).values[:, -1:]
                        logits = logits.masked_fill(logits < least, -torch.inf)
                    new = torch.multinomial((logits / temperature).softmax(-1), 1)
                tokens = torch.cat((tokens, new), 1)
        finally:
            self.train(training)
        return tokens


class ReformerModule(LanguageModel):
    """Train a Reformer; takes `Reformer`'s arguments, and `optimizer` and `scheduler` as `RecipeModule` does.

    >>> trainer = lightning.Trainer(strategy="reversible")
    >>> trainer.fit(ReformerModule(length=512, dim=128, depth=2), Topics(length=512))

    Arguments are saved with the checkpoint and have to be plain Python: numbers, lists, dictionaries.

    Args:
        optimizer, scheduler: see `RecipeModule`.
        test_hashes: further numbers of hashes with which the held-out data are tested; 0 is full attention. Each gives
            a metric, such as `test/acc_lsh8`.
        **net: arguments of `Reformer`.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        test_hashes: Sequence[int] = (),
        **net: Any,
    ) -> None:
        if images := sorted({"shape", "classes"} & set(net)):
            raise ValueError(
                f"{', '.join(images)}: the data are images, and a Reformer works on tokens; take data=topics,"
                " text_file, enwik8, duplication or imagenet64"
            )
        if "tokenizer" in net:
            raise ValueError(f"data.tokenizer={net['tokenizer']}: a Reformer reads bytes; leave the tokenizer out")
        network = Reformer(**net)
        super().__init__(network, optimizer=optimizer, scheduler=scheduler)
        self.example_input_array = torch.zeros(1, network.length, dtype=torch.long)
        self.test_hashes = list(test_hashes)
        if any(hashes < 0 for hashes in self.test_hashes):
            raise ValueError(f"test_hashes={self.test_hashes}: pass numbers of hashes, 0 for full attention")
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        for hashes in self.test_hashes:
            with self.net.hashing(hashes):
                right = self.accuracy(self(batch[0]), batch[-1])
            name = f"test/acc_lsh{hashes}" if hashes else "test/acc_full"
            self.log(name, right, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)


def _check_split_dim(split_dim: int | None, dim: int) -> int | None:
    """Return 2, the width, or None for streams of full width; ValueError for other dimensions."""
    if split_dim is None:
        return None
    if split_dim in (2, -1):
        if dim % 2:
            raise ValueError(f"split_dim={split_dim}: a width of dim={dim} cannot be halved; take an even one")
        return 2
    why = {
        0: "the streams would be different texts, each of which informs the other",
        1: "the streams would be the halves of a text, and the first would see the second, which it is to predict",
    }.get(split_dim % 3 if split_dim in (-3, -2) else split_dim, "tokens have the dimensions 0 to 2")
    raise ValueError(
        f"split_dim={split_dim}: {why}; take null (None) for two streams of the model's width, or 2 to halve it"
    )


def _branch(coupling: str | Mapping[str, Any], width: int) -> int:
    """Return the width that a block has to return."""
    shape = get_coupling(coupling).branch_shape(torch.Size((2, 3, width)))
    if shape[:2] != (2, 3):
        raise ValueError(
            f"coupling={coupling!r} asks blocks for more along another dimension than 2, the width; set its dim to 2"
        )
    return shape[2]


def _check(depth: int, activation: str, attention: Sequence[str], ff_chunks: int, shift: bool) -> None:
    """Raise ValueError for options that are not possible."""
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth={depth!r}: a Reformer has no stages; pass the number of its layers, 1 or more")
    if not isinstance(ff_chunks, int) or ff_chunks < 1:
        raise ValueError(f"ff_chunks={ff_chunks!r}: pass a whole number, 1 or more")
    if ff_chunks > 1 and shift:
        raise ValueError(
            f"ff_chunks={ff_chunks} with shift=True: with shift a token needs the token before it; leave out one"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    if isinstance(attention, str) or not attention or set(attention) - set(KINDS):
        raise ValueError(f"attention={attention!r}: pass a list of {', '.join(KINDS)}, which the layers take in turn")


def _grid(
    length: int, dim: int, axial: Sequence[int] | None, axial_dims: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Return the axial grid of positions and the width of each axis; ValueError for a grid that does not fit."""
    if axial is None:
        rows = 1 if length <= 1024 else math.isqrt(length)
        axial = [length] if rows == 1 else [rows, -(-length // rows)]
    shape = list(axial)
    if not shape or math.prod(shape) < length:
        raise ValueError(f"axial={shape} has {math.prod(shape)} positions, and length={length} needs as many or more")
    dims = list(axial_dims or [dim // len(shape)] * (len(shape) - 1) + [dim - dim // len(shape) * (len(shape) - 1)])
    if len(dims) != len(shape) or sum(dims) != dim:
        raise ValueError(f"axial_dims={dims}: pass one for each axis of axial={shape}, which sum up to dim={dim}")
    return shape, dims
