"""The step before is undone on a stream of its own, while the backward of this one runs, where a device has streams.

    main   undo n | backward n     | backward n - 1 | ...
    side          | undo n - 1     | undo n - 2     | ...

Small kernels leave a device idle; here it has two queues of them, and holds what two steps have saved, not one. The
idea is PaReprop's, https://arxiv.org/abs/2306.09342. What makes it right at every depth:

1. Side waits for main before it begins: all that it reads has been written, and memory of its own pool that main has
   used and let go is no longer in use.
2. Main waits for side when autograd asks for the step, and before anything that side uses may be freed.
3. The streams that side reads are kept until then, as main may have allocated them, and would use their memory again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_revlib.nn.state.rng import NOTHING

if TYPE_CHECKING:
    from lightning_revlib.nn.engine.frame import Frame
    from lightning_revlib.nn.engine.norm_outputs import Norms
    from lightning_revlib.nn.engine.tape import Tape


class Ahead:
    """The step of a tape that is undone before autograd asks for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.side = side_stream(self.module, device)
        self.main: Any = None  # if it has not yet waited for side
        self.index = -1  # of the step; no frame, which would refer to this
        self.caught: list[Tensor | None] | None = None
        self.norms: Norms | None = None

    def start(self) -> None:
        """Another backward begins."""
        self.wait()
        self.caught = self.norms = None

    def begin(self, tape: Tape, frame: Frame) -> None:
        """Undo the step below the frame's, if autograd can ask for it."""
        below = None if frame.below is None else frame.below()
        main = self.module.current_stream(self.device)
        if below is None or not below.saved or below.chunk or frame.chunk or below.again or main == self.side:
            return  # what the second run's context has kept may be freed before side has read it
        assert tape.streams is not None
        self.main, tape.passed = main, {frame.index: tape.streams}
        self.side.wait_stream(main)
        with self.module.stream(self.side), below.environment.again() if below.environment else NOTHING:
            tape._undo(below, ahead=True)
        self.index, self.caught, self.norms = below.index, below.caught, below.norms
        below.caught = below.norms = None  # until autograd asks, and main waits

    def take(self, frame: Frame) -> bool:
        """Whether the step is the one undone; the frame then has caught what it saves."""
        self.wait()
        found = self.caught is not None and self.index == frame.index
        if found:
            frame.caught, frame.norms = self.caught, self.norms
            frame.tape.leave(frame)
        if self.index >= frame.index:
            self.caught = self.norms = None
        return found

    def wait(self) -> None:
        """From here on main may use, and free, what side has used."""
        if self.main is not None:
            self.main.wait_stream(self.side)
            self.main = None

    def __del__(self) -> None:
        self.wait()


def has_streams(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


@lru_cache(maxsize=64)
def side_stream(module: Any, device: torch.device) -> Any:
    """One for each device, so that memory of its pool serves one backward after the other."""
    return module.Stream(device=device)
