"""The order in which backward undoes the steps of a tape."""

from __future__ import annotations

from typing import Any


class Schedule:
    """Steps are undone one by one, when autograd asks for what they saved. Subclass it for another order."""

    def start(self) -> None:
        """Note that a backward begins at the output."""

    def rewind(self, tape: Any, frame: Any) -> None:
        """Undo steps of the tape down to the frame's."""
        tape.undo_to(frame)
