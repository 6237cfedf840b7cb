"""Couplings as a user gives them: by a name, a mapping, a `Coupling` or a pair of callables."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lightning_revlib.nn.coupling.base import Alternating, Coupling
from lightning_revlib.nn.coupling.bdia import BDIA
from lightning_revlib.nn.coupling.standard import Additive, Affine, Leapfrog, Midpoint, Momentum, Scaled

CouplingSpec: TypeAlias = str | Coupling | Mapping[str, Any]
CouplingFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def additive_coupling_forward(other_stream: Tensor, fn_out: Tensor) -> Tensor:
    """Return other + f, the additive coupling in RevLib's signature."""
    return other_stream + fn_out


def additive_coupling_inverse(output: Tensor, fn_out: Tensor) -> Tensor:
    """Return out - f, the inverse of `additive_coupling_forward`."""
    return output - fn_out


@dataclass(unsafe_hash=True)
class Pair(Alternating):
    """(a, b) -> (b, coupling_forward(a, f)); inverse a = coupling_inverse(b', f).

    A pair of callables in RevLib's signature, given as `coupling_forward` and `coupling_inverse`.
    """

    coupling_forward: Callable[[Tensor, Tensor], Tensor] = additive_coupling_forward
    coupling_inverse: Callable[[Tensor, Tensor], Tensor] = additive_coupling_inverse

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.coupling_forward(a, f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.coupling_inverse(out, f)


COUPLINGS: dict[str, type[Coupling]] = {
    cls.__name__.lower(): cls for cls in (Additive, Affine, Momentum, Midpoint, Leapfrog, Scaled, BDIA)
}
"""The couplings by name, as in `coupling="additive"`. Add a class of your own to give it a name."""


def get_coupling(coupling: CouplingSpec, **options: Any) -> Coupling:
    """Return the coupling that a name with options, a mapping or a `Coupling` stands for.

    >>> get_coupling("momentum", gamma=0.9) == get_coupling({"name": "momentum", "gamma": 0.9})
    True

    Raises ValueError for an unknown name or option, and for an option that must be a number and is not.
    """
    if isinstance(coupling, Coupling):
        return coupling
    if isinstance(coupling, Mapping):
        options = {**coupling, **options}
        if "name" not in options:
            raise ValueError(f"coupling={dict(coupling)!r} has no name; write {{'name': 'momentum', 'gamma': 0.9}}")
        coupling = options.pop("name")
    if coupling not in COUPLINGS:
        near = difflib.get_close_matches(str(coupling), COUPLINGS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"coupling={coupling!r} is unknown; {hint}There is {', '.join(COUPLINGS)}, or your own Coupling"
        )
    _check_options(coupling, options)
    return COUPLINGS[coupling](**options)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the coupling of that name does not have, or that has to be a number."""
    known = inspect.signature(COUPLINGS[name]).parameters
    if unknown := sorted(set(options) - set(known)):
        owners = [name for name, other in COUPLINGS.items() if unknown[0] in inspect.signature(other).parameters]
        hint = f"; {', '.join(owners)} has it" if owners else ""
        raise ValueError(f"coupling {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}{hint}")
    for option, value in options.items():
        usual = known[option].default
        if isinstance(usual, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"coupling {name!r}: {option}={value!r} is no number; take one, such as {usual}")
        if isinstance(value, str) and value.startswith("<"):
            raise ValueError(
                f"coupling {name!r}: {option}={value} stands for what a checkpoint or config could not save; swap with"
                f" targets that have {option} itself"
            )


def read_couplings(
    coupling: CouplingSpec | Sequence[CouplingSpec],
    forward: CouplingFunction | Sequence[CouplingFunction] | None,
    inverse: CouplingFunction | Sequence[CouplingFunction] | None,
) -> tuple[Coupling, ...]:
    """Return one coupling or more, from names, mappings, couplings or pairs of callables. Raises ValueError."""
    if forward is None and inverse is None:
        if not (couplings := _as_list(coupling)):
            raise ValueError(f"coupling={coupling!r} is empty; name at least one, such as 'additive'")
        return tuple(map(get_coupling, couplings))
    if forward is None or inverse is None:
        given, missing = ("coupling_forward", "coupling_inverse")[:: 1 if inverse is None else -1]
        raise ValueError(f"{given} was given without {missing}: the engine needs both directions of your coupling")
    forwards, inverses = _as_list(forward), _as_list(inverse)
    if len(forwards) != len(inverses) or not forwards:
        raise ValueError(
            f"coupling_forward has {len(forwards)} entries and coupling_inverse {len(inverses)}; pass as many of each,"
            " and at least one"
        )
    return tuple(map(Pair, forwards, inverses))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
