"""What a block's call depends on besides its input. Each kind is a file and an entry of `KINDS`."""

from lightning_revlib.nn.state.arguments import Arguments
from lightning_revlib.nn.state.attributes import Attributes
from lightning_revlib.nn.state.base import KINDS, Call, CallState, Scope, State
from lightning_revlib.nn.state.buffers import Buffers
from lightning_revlib.nn.state.compilation import Eagerness
from lightning_revlib.nn.state.context import Context, FunctionModes
from lightning_revlib.nn.state.frozen import Frozen
from lightning_revlib.nn.state.kernels import Kernels
from lightning_revlib.nn.state.norm_statistics import NormStatistics
from lightning_revlib.nn.state.parameters import Parameters
from lightning_revlib.nn.state.parametrizations import Parametrizations
from lightning_revlib.nn.state.rng import Random
from lightning_revlib.nn.state.settings import Settings

__all__ = ["KINDS", "Call", "CallState", "Scope", "State"]

# Settings come before the attributes that a call itself has changed; function modes last, as they see what torch does
# from then on.
KINDS += [Arguments, Buffers, NormStatistics, Frozen, Settings, Attributes, Parametrizations]
KINDS += [Random, Parameters, Context, Kernels, Eagerness, FunctionModes]
