"""Coupling x condition x dtype against ordinary autograd: a new coupling is tested without a new line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_revlib as revlib
from tests.nn.conditions import CONDITIONS, Case


def _forward(other: Tensor, f: Tensor) -> Tensor:
    return 0.8 * other + 0.2 * f


def _inverse(out: Tensor, f: Tensor) -> Tensor:
    return (out - 0.2 * f) / 0.8


def _exact(name: str) -> bool:
    try:
        revlib.get_coupling(name).on_grid(12)
    except ValueError:
        return False
    return True


COUPLINGS: dict[str, dict[str, Any]] = {
    **{name: {"coupling": name} for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid},
    "pair": {"coupling_forward": _forward, "coupling_inverse": _inverse},
    "mixed": {"coupling": ["additive", {"name": "momentum", "gamma": 0.8}, "midpoint"]},
    **{f"{name}, exact": {"coupling": name, "grid_bits": 12} for name in revlib.COUPLINGS if _exact(name)},
    "momentum, exact": {"coupling": {"name": "momentum", "gamma": 0.125}, "grid_bits": 12},
    "scaled, exact": {"coupling": {"name": "scaled", "scale": -0.5}, "grid_bits": 12},
}
DTYPES = {"float64": 1e-12, "float32": 1e-4, "bf16-autocast": 5e-2}


def errors(reference: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[float]:
    """Relative errors in the 2-norm; what is below a thousandth of the largest tensor counts as that large."""
    assert [t is None for t in tensors] == [t is None for t in reference]
    pairs = [
        (x.detach().double(), y.detach().double()) for x, y in zip(reference, tensors, strict=True) if x is not None
    ]
    floor = 1e-3 * max(x.norm().item() for x, _ in pairs)
    return [(x - y).norm().item() / max(x.norm().item(), floor) for x, y in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_equals_ordinary_autograd(coupling: str, name: str, dtype: str) -> None:
    compare(coupling, name, dtype)


def compare(coupling: str, name: str, dtype: str, **options: Any) -> None:
    results = []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        torch.manual_seed(3)
        autocast = dtype == "bf16-autocast"
        case = Case(
            cls, COUPLINGS[coupling] | options, torch.float64 if dtype == "float64" else torch.float32, autocast
        )
        results.append([*CONDITIONS[name](case), torch.rand(1)])  # the generator ends in the same state, too
    assert max(errors(*results)) <= (0 if "exact" in coupling else DTYPES[dtype])


def test_at_least_400_cells() -> None:
    assert len(COUPLINGS) * len(CONDITIONS) * len(DTYPES) >= 400
