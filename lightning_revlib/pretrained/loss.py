"""Cross-entropy by chunks: the logits of a language model, which are larger than all else, are never whole.

If the body is reversible, the logits are most of what a training step holds: 8,192 tokens of a vocabulary of 49,152
take 1.6 GB in float32, and their gradient as much again. Here the head runs on one chunk of tokens after another, and
again in backward. The cost is a second forward of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TOKENS = 256  # in a chunk


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    tokens: int = TOKENS,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return ``F.cross_entropy(head(hidden), labels)``, with the logits of `tokens` rows in memory at a time.

    >>> loss = chunked_cross_entropy(hidden[:-1], model.lm_head, ids[1:])

    Args:
        hidden: of shape (rows, width).
        head: maps (n, width) to logits (n, classes), each row by itself.
        labels: the classes, of shape (rows,).
        tokens: the number of rows in a chunk.
        ignore_index: the label of rows that do not count.
        label_smoothing: the share of the target that is spread over all classes.
        reduction: "mean" or "sum".

    Raises ValueError for other shapes or another reduction.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden of shape {list(hidden.shape)} and labels of shape {list(labels.shape)}: pass (rows, width) and"
            " (rows,), such as hidden.flatten(0, 1) and labels.flatten()"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: pass 'mean' or 'sum'")
    check_tokens(tokens)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}

    def one(rows: Tensor, classes: Tensor) -> Tensor:
        return functional.cross_entropy(head(rows), classes, **options)

    chunks = zip(hidden.split(tokens), labels.split(tokens), strict=True)
    total = torch.stack([checkpoint(one, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def check_tokens(tokens: int) -> None:
    """Raise ValueError if it is no number of rows in a chunk."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r}: pass the number of rows in a chunk, such as {TOKENS}")
