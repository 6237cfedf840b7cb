"""A share of the random programs; `python -m tests.fuzz` runs as many as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz.check import check, describe
from tests.fuzz.programs import draw

PROGRAMS = 60


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_random_program_is_as_ordinary_autograd(seed: int) -> None:
    program = draw(seed)
    faults = check(program)
    assert not faults, describe(program, faults)
