"""What would save most of a step's memory: changes, counted by simulating each, and tensors that are kept in vain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_revlib.accounting.owners import GRADIENTS, HELD, STATE, STREAMS
from lightning_revlib.accounting.result import Advice, Memory
from lightning_revlib.accounting.simulate import simulated
from lightning_revlib.accounting.step import Program, count
from lightning_revlib.accounting.variants import variants
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.nn.plan.unshard import fsdp_modules

MOST = 4  # pieces of advice
LEAST = 0.01  # share of the highest bytes that a change has to save
EXPECTED = (STATE, GRADIENTS)  # when a step has ended
FEW = 1024  # bytes
FAILURES = (ValueError, TypeError, RuntimeError)  # of a change that does not suit the program


def advise(program: Program, result: Memory, device: Any = None) -> tuple[Advice, ...]:
    """Return what would save most bytes, the largest first."""
    try:
        found = [*_kept(program, result), *_changes(program, device)]
    except FAILURES:  # the step cannot be simulated
        found = list(_kept(program, result))
    found = [each for each in found if each.saved >= LEAST * result.highest.total]
    return tuple(sorted(found, key=lambda each: -each.saved)[:MOST])


def _changes(program: Program, device: Any) -> Iterator[Advice]:
    """Yield the changes that the program allows, each made alone, with the bytes by which the highest is lower."""
    with simulated(program, device) as fake:
        before = count(fake).highest.total
        for name, line, change in variants(fake):
            try:
                with change as changed:
                    after = count(changed).highest.total
            except FAILURES:
                if fsdp_modules(program.model):  # which the failure has left in the midst of a forward
                    return
                continue
            yield Advice(name, before - after, line)


def _kept(program: Program, result: Memory) -> Iterator[Advice]:
    """Yield what the program keeps although neither the step nor a later one needs it."""
    left = [s for s in result.shares if 0 < s.born and result.times.end < s.freed and s.owner.kind not in EXPECTED]
    left = [s for s in left if s.size >= FEW]  # than numbers, such as a measured drift
    owners = ", ".join(dict.fromkeys(str(s.owner) for s in sorted(left, key=lambda s: -s.size)[:2]))
    yield Advice(
        f"do not keep tensors of the step when it has ended ({owners})",
        sum(s.size for s in left),
        "total += loss.detach()  # a list, a sum or a metric that keeps a graph keeps what the graph was made of",
    )
    forward = [s for s in result.shares if s.born <= result.times.forward < s.freed]
    for path, stack in stacks(program.model).items():
        if set(stack.step_treatments()) != {"reversible"} or stack.budget is not None:
            continue
        sizes = {s.size for s in forward if s.owner == (STREAMS, path)}
        states = [s for s in forward if s.owner.kind == HELD and _is_in(s.owner.path, path) and s.size in sizes]
        yield Advice(
            f"do not keep the hidden states of {len(states)} blocks of {path or 'the model'}",
            sum(s.size for s in states),
            "model(**batch, output_hidden_states=False)  # or a loss of the last hidden state alone",
        )


def _is_in(path: str, stack: str) -> bool:
    return not stack or path.startswith(f"{stack}.")
