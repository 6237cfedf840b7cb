"""A step's bytes over time by row of the table, thinned out for a picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_revlib.accounting.books import Moment, Share, Times
from lightning_revlib.accounting.owners import Owner
from lightning_revlib.nn.meter import format_bytes

POINTS, ROWS = 1200, 10  # at most


@dataclass(frozen=True)
class Curve:
    """Times of a step; for each row its bytes at those; when the parts of the step end; the peak and its name."""

    times: list[int]
    rows: dict[str, list[int]]
    totals: list[int]
    ends: dict[str, int]
    peak_time: int
    peak: str


class Thinned:
    """The bytes by row at one time of each interval of times: the time with the most bytes."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.points: list[tuple[int, int, dict[str, int]]] = []  # total, time, bytes by row

    def add(self, time: int, sizes: Counter[str]) -> None:
        """Take the bytes at the next time."""
        total = sum(sizes.values())
        if time % self.stride == 0:
            self.points.append((total, time, dict(sizes)))
        elif total > self.points[-1][0]:
            self.points[-1] = total, time, dict(sizes)


def curve_of(shares: Iterable[Share], names: Mapping[Owner, str], times: Times, highest: Moment) -> Curve:
    """Return the bytes over a step. `names` are those of rows, in order; the smallest rows are put together."""
    changes: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for share in shares:
        changes[share.born][names[share.owner]] += share.size
        changes[share.freed][names[share.owner]] -= share.size
    live, thinned = Counter[str](), Thinned(max(1, times.end // POINTS))
    for time in range(times.end + 1):
        live.update(changes.get(time, {}))
        thinned.add(time, live)
    most: Counter[str] = Counter()
    for _, _, sizes in thinned.points:
        most |= Counter(sizes)
    large = {name for name, _ in most.most_common(ROWS)}
    rows = {n: [sizes.get(n, 0) for _, _, sizes in thinned.points] for n in dict.fromkeys(names.values()) if n in large}
    if len(most) > len(large):
        rows["others"] = [total - sum(sizes.get(n, 0) for n in large) for total, _, sizes in thinned.points]
    ends = {"forward": times.forward, "backward": times.backward, "optimizer": times.optimizer}
    peak = f"{format_bytes(highest.total)}, {highest.cause}"
    totals, at = [total for total, _, _ in thinned.points], [time for _, time, _ in thinned.points]
    return Curve(at, rows, totals, ends, highest.time, peak)
