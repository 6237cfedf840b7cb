"""How often callbacks measure."""

from __future__ import annotations


def check_every_n_steps(n: int) -> None:
    """Raise ValueError if it is no number of batches."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"every_n_steps={n!r}: pass a number of batches, at least 1")
