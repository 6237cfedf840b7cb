"""How steps are executed. Each treatment is a file and an entry of `TREATMENTS`."""

from lightning_revlib.nn.treatments.base import TREATMENTS, Treatment
from lightning_revlib.nn.treatments.checkpoint import Checkpoint
from lightning_revlib.nn.treatments.offload import Offload
from lightning_revlib.nn.treatments.reversible import Reversible
from lightning_revlib.nn.treatments.selective import Selective
from lightning_revlib.nn.treatments.store import Store

__all__ = ["TREATMENTS", "Treatment"]

TREATMENTS.update(reversible=Reversible, checkpoint=Checkpoint, selective=Selective, offload=Offload, store=Store)
