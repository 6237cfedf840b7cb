"""A run of two processes, started as a user's script would start them, in which one fails.

python failing_rank.py OUT RANK HOW     HOW: "kill" or "raise", in the fourth step
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.strategies.helpers import Net, data, trainer


class Failing(Net):
    rank, how = 0, ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3 and self.global_rank == self.rank:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank fails")
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Failing.rank, Failing.how = int(sys.argv[2]), sys.argv[3]
    trainer(Path(sys.argv[1]), strategy="reversible", devices=2, max_epochs=50).fit(Failing(), data())
