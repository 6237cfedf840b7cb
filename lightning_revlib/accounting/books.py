"""Whose bytes are whose: a step's entries, its moments, and at each of them the bytes by owner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_revlib.accounting.layout import Layout, is_within
from lightning_revlib.accounting.ledger import Entry
from lightning_revlib.accounting.owners import HELD, LOSS, MODULE, NEEDED, OPTIMIZER, REST, STREAMS, Owner


class Share(NamedTuple):
    """A storage and its owner. It takes memory while born <= t < freed."""

    owner: Owner
    size: int
    born: int
    freed: int
    operation: str


class Times(NamedTuple):
    """When the parts of a step ended, and when its loss began."""

    loss: int
    forward: int
    backward: int
    optimizer: int
    end: int

    def part(self, time: int) -> str:
        """Return the part of the step that a time is in."""
        parts = {"forward": self.forward, "backward": self.backward, "the optimizer's step": self.optimizer}
        return next((part for part, end in parts.items() if time <= end), "the end of the step")


class Moment(NamedTuple):
    """The bytes at one time of a step, by owner; `cause` is the operation that has just allocated, and for whom."""

    name: str
    time: int
    bytes: Mapping[Owner, int]
    cause: str = ""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Bookkeeper:
    """Finds the owners of entries.

    Args:
        layout: of the model.
        times: of the step.
        head: the path of the last module with parameters, or None if that is in a stack. What forward allocates
            outside of stacks since that began belongs to logits and loss.
    """

    def __init__(self, layout: Layout, times: Times, head: str | None) -> None:
        self.layout, self.times, self.head = layout, times, head

    def share(self, entry: Entry) -> Share:
        freed = self.times.end + 1 if entry.freed is None else entry.freed
        return Share(self._owner(entry), entry.size, entry.born, freed, entry.operation)

    def _owner(self, entry: Entry) -> Owner:
        place, stack, block = entry.place, self.layout.stack_of(entry.place), self.layout.block_of(entry.place)
        if entry.owner is not None:
            return entry.owner
        if entry.born > self.times.backward:
            return Owner(OPTIMIZER)
        if block is not None:
            return Owner(HELD if entry.born <= self.times.forward else NEEDED, block)
        if stack is not None:
            return Owner(STREAMS, stack)
        if self._is_of_loss(entry):
            return Owner(LOSS)
        return Owner(REST) if place is None else Owner(MODULE, self.layout.group_of(place))

    def _is_of_loss(self, entry: Entry) -> bool:
        if entry.born <= self.times.forward:
            return entry.born > self.times.loss
        return entry.place is None or (self.head is None and not entry.place) or is_within(self.head or "", entry.place)


def moment(name: str, shares: Iterable[Share], since: int, until: int) -> Moment:
    """Return the time with the most bytes in an interval, ends included; the first one of several."""
    time, cause = _highest(shares, since, until)
    found: defaultdict[Owner, int] = defaultdict(int)
    for share in shares:
        if share.born <= time < share.freed:
            found[share.owner] += share.size
    return Moment(name, time, dict(found), cause)


def _highest(shares: Iterable[Share], since: int, until: int) -> tuple[int, str]:
    """Return the time with the most bytes, and what has allocated there."""
    changes: defaultdict[int, int] = defaultdict(int)
    causes = {}
    for share in shares:
        changes[share.born] += share.size
        changes[share.freed] -= share.size
        causes[share.born] = share
    live = sum(change for time, change in changes.items() if time <= since)
    highest, best = live, since
    for time in range(since + 1, until + 1):
        live += changes.get(time, 0)
        if live > highest:
            highest, best = live, time
    if not best or best not in causes or since == until:
        return best, ""
    return best, f"{causes[best].operation}: {causes[best].owner}"
