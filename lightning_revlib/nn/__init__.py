"""Reversible execution in pure torch; nothing in here imports lightning (the linter holds it)."""

from lightning_revlib.nn.coupling import Alternating, Coupling
from lightning_revlib.nn.couplings import (
    COUPLINGS,
    Additive,
    Affine,
    Invertible,
    Leapfrog,
    Midpoint,
    Momentum,
    Scaled,
    additive_coupling_forward,
    additive_coupling_inverse,
    get_coupling,
)
from lightning_revlib.nn.grid import BDIA
from lightning_revlib.nn.invertible import Orthogonal, Permutation, SpaceToDepth
from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.modulelist import ReversibleModuleList
from lightning_revlib.nn.report import Report, report
from lightning_revlib.nn.sequence import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.swap import restore, swap

__all__ = [
    "CoupledSequential",
    "ReversibleSequential",
    "ReversibleModuleList",
    "Coupling",
    "Alternating",
    "Additive",
    "Affine",
    "Momentum",
    "Midpoint",
    "Leapfrog",
    "Scaled",
    "BDIA",
    "Invertible",
    "COUPLINGS",
    "get_coupling",
    "additive_coupling_forward",
    "additive_coupling_inverse",
    "SpaceToDepth",
    "Permutation",
    "Orthogonal",
    "swap",
    "restore",
    "report",
    "Report",
    "MemoryMeter",
]
