"""What users do with a stack of blocks, one function a condition, by section. See `base`."""

from tests.nn.conditions import arguments, blocks, copies, graph, layouts, requires_grad, state, treatments
from tests.nn.conditions.base import BATCH, CONDITIONS, WIDTH, Case

__all__ = [
    "BATCH",
    "CONDITIONS",
    "WIDTH",
    "Case",
    "arguments",
    "blocks",
    "copies",
    "graph",
    "layouts",
    "requires_grad",
    "state",
    "treatments",
]
