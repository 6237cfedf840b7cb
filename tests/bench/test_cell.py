"""Every contestant on every workload, at tiny sizes, computes the gradients of ordinary autograd or says why not."""

from __future__ import annotations

import gc

import pytest
import torch

from lightning_revlib.bench import measure, timing
from lightning_revlib.bench.cell import BUILDS, ROUNDS, cell, execute
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant, checkpointed, ours
from lightning_revlib.bench.workloads import WORKLOADS, Size
from lightning_revlib.nn import CoupledSequential

TINY = {"mlp": Size(4, 32, 64), "irevnet": Size(4, 8, 2), "reformer": Size(4, 16, 1)}
CPU = torch.device("cpu")
# MemCNN does not draw the same numbers again. Selective checkpointing stores products that LSH changes in place later.
WRONG = {"reformer": {"MemCNN", "checkpoint, selective"}}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_contestant_is_right_or_says_why_not(name):
    rows, _ = cell(WORKLOADS[name], TINY.get(name, Size(4, 16, 8)), CONTESTANTS, device=CPU, seconds=0)
    found = {row.contestant: row for row in rows}
    assert list(found) == [c.name for c in CONTESTANTS]
    for row in rows:
        if row.contestant in WRONG.get(name, ()):
            continue
        assert row.right if not row.note else row.note.startswith(("n/a: ", "not installed")), row
    least, plain = found["lightning_revlib"], found["plain"]
    assert least.right and least.peak < plain.peak
    streams = 2 if name == "momentumnet" else 1  # one stream is put out, and both are held
    assert least.held / least.output == pytest.approx(streams, abs=0.3)  # the drift sentinel counts in tiny cells
    if name not in ("irevnet", "reformer"):  # blocks that are not all alike, and checkpoint parts of themselves
        # 4/3, but where drift is ignored, as here, the first block need not be run again to its end.
        assert (4 - 1 / least.depth) / 3 < least.flops / plain.flops < 1.334  # type: ignore[operator]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_sizes_go_from_4_to_256_blocks(workload):
    assert len({s.width for s in workload.full}) >= 3
    assert {s.depth for s in workload.quick} >= {4} and workload.cuda
    for size in (*workload.quick, *workload.full):
        assert 4 <= size.depth <= 256 and size.depth % 4 == 0


def test_a_peer_that_fails_is_a_note():
    def build(stack, draws):
        raise RuntimeError("no\nway")

    rows, times = cell(WORKLOADS["mlp"], Size(2, 8, 4), [Contestant("peer", build)], device=CPU, seconds=0.01)
    assert rows[0].note == "raises RuntimeError: no" and not rows[0].right and not times


def test_a_peer_that_is_missing_is_listed():
    rows, _ = cell(WORKLOADS["mlp"], Size(2, 8, 4), [Contestant("peer", ours, "no_such")], device=CPU, seconds=0)
    assert rows[0].note == rows[0].version == "not installed"


def test_wrong_gradients_are_found():
    class Wrong(CoupledSequential):
        def forward(self, x):
            return super().forward(x * 1.01)

    def build(stack, draws):
        stack.__class__ = Wrong
        return stack

    rows, _ = cell(WORKLOADS["mlp"], Size(2, 8, 4), [Contestant("peer", build)], device=CPU, seconds=0)
    assert rows[0].error > 1e-3 and not rows[0].right
    assert measure.error([torch.ones(2)], [None]) == 1
    assert measure.error([torch.ones(2)], [torch.full((2,), torch.nan)]) == float("inf")


def test_bytes_held_by_checkpointed_segments():
    workload, size = WORKLOADS["mlp"], Size(16, 32, 64)
    stack, x = workload.stack(size), workload.input(size, requires_grad=True)

    def held(build):
        return measure.counts(execute(Contestant("", build), stack, False), x)

    half = x.nbytes // 2
    assert held(checkpointed()).held == (2 + 15) * half  # output, and each stream but the input's and the last
    assert held(checkpointed(segment=4)).held == (2 + 6) * half
    assert held(checkpointed(segment=None)).held == held(checkpointed(segment=4)).held
    assert held(checkpointed(selective=True)).flops == held(lambda stack, draws: stack).flops


def test_times_take_turns_and_ratios_have_an_interval():
    workload, size = WORKLOADS["mlp"], Size(2, 8, 4)
    stack, x = workload.stack(size), workload.input(size, requires_grad=True)
    found = timing.times({"a": stack, "b": stack}, x, seconds=0, rounds=(4, 4))
    assert len(found["a"]) == len(found["b"]) == 4
    assert len(timing.times({"a": stack}, x, seconds=0, rounds=(2, 2), warm=True)["a"]) == 2
    assert all(p.grad is None for p in stack.parameters())
    assert timing.ratio([2.0] * 9, [1.0] * 9) == (2, 2, 2)
    middle, low, high = timing.ratio([float(i) for i in range(1, 21)], [1.0] * 20)
    assert 1 < low < middle == 10.5 < high < 20


def test_the_collector_is_left_as_it_was():
    with timing.frozen():
        before = gc.get_freeze_count()  # as of the tests themselves
        with timing.frozen():
            pass
        assert gc.get_freeze_count() == before > 0 and gc.isenabled()
    gc.unfreeze()
    with timing.frozen():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0 and gc.isenabled()
    gc.freeze()


def test_the_fastest_is_chosen_by_other_rounds_than_it_is_compared_in():
    own, lucky = [1.0] * 20, [0.9] * 10 + [1.1] * 10  # each is fast in one half of the rounds
    others = {"a": lucky, "b": lucky[::-1]}
    assert timing.over_fastest(own, others)[0] == pytest.approx(1 / 1.1)
    assert timing.over_fastest(own, {"slow": [4.0] * 20, "fast": [2.0] * 20}) == (0.5, 0.5, 0.5)


def test_copies_share_the_parameters_unless_of_another_dtype():
    stack = WORKLOADS["conv"].stack(Size(2, 4, 2))
    for contestant in (c for c in CONTESTANTS if c.name in ("plain", "lightning_revlib")):
        copy, double = (execute(contestant, stack, False, dtype) for dtype in (None, torch.float64))
        assert {id(p) for p in copy.parameters()} == {id(p) for p in stack.parameters()}
        assert not {id(b) for b in copy.buffers()} & {id(b) for b in stack.buffers()}
        assert not {id(p) for p in double.parameters()} & {id(p) for p in stack.parameters()}
    assert all(p.dtype is torch.float32 for p in stack.parameters())


def test_ours_ignores_drift_unless_the_stack_asks_for_it():
    blocks = [torch.nn.Linear(4, 4) for _ in range(2)]
    assert ours(CoupledSequential(*blocks), False).on_drift == "ignore"
    assert ours(CoupledSequential(*blocks, on_drift="raise"), False).on_drift == "raise"


def test_ours_plain_and_two_peers_are_timed_once_more():
    rows, times = cell(WORKLOADS["mlp"], Size(2, 8, 4), CONTESTANTS, device=CPU, seconds=0.01)
    peers = [r.contestant for r in rows if r.reversible and not r.ours and not r.note]
    assert {"plain", "lightning_revlib"} < set(times) and set(times) <= {"plain", "lightning_revlib", *peers}
    assert len(times) == 2 + min(2, len(peers)) and min(map(len, times.values())) >= BUILDS[0] * ROUNDS
    assert all(r.seconds and r.over_plain for r in rows if not r.note)
