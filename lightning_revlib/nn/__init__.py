"""Reversible execution in pure torch; nothing in here imports lightning (the linter holds it)."""

from lightning_revlib.nn.convert.report import Report, report
from lightning_revlib.nn.convert.swap import restore, swap
from lightning_revlib.nn.coupling.base import Alternating, Coupling
from lightning_revlib.nn.coupling.bdia import BDIA
from lightning_revlib.nn.coupling.invertible import Invertible, Orthogonal, Permutation, SpaceToDepth
from lightning_revlib.nn.coupling.registry import (
    COUPLINGS,
    additive_coupling_forward,
    additive_coupling_inverse,
    get_coupling,
)
from lightning_revlib.nn.coupling.standard import Additive, Affine, Leapfrog, Midpoint, Momentum, Scaled
from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.stacks.module_list import ReversibleModuleList
from lightning_revlib.nn.stacks.sequential import CoupledSequential, ReversibleSequential

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
