"""Packed sequences of models of transformers, where positions have no values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unpacked() -> Iterator[None]:
    """Have models of transformers take sequences as not packed inside, without a look at the values of positions.

    With fake tensors they would make a mask of (length, length) otherwise, which no training has whose positions are
    those of one sequence.
    """
    masks = sys.modules.get("transformers.masking_utils")
    original = getattr(masks, "find_packed_sequence_indices", None)
    if masks is None or original is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = original  # type: ignore[attr-defined]
