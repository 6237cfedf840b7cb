"""Watch a training step, part by part, and return its bytes by owner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_revlib.accounting.books import Bookkeeper, Times, moment
from lightning_revlib.accounting.layout import Layout
from lightning_revlib.accounting.ledger import Ledger
from lightning_revlib.accounting.optimizer import wrapped
from lightning_revlib.accounting.owners import BATCH, BUFFERS, GRADIENTS, PARAMETERS, STATE, STREAMS, Owner
from lightning_revlib.accounting.places import Places
from lightning_revlib.accounting.result import Memory
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.stacks.module_list import Layerwise


class Recorder:
    """A context manager that watches one training step; `end` follows each of its parts, and `result` the whole.

    >>> with Recorder(model, batch, optimizer) as recorder:
    ...     loss = model(**batch).loss
    ...     recorder.end("forward")
    ...     loss.backward()
    ...     recorder.end("backward")
    ...     optimizer.step()
    ...     recorder.end("optimizer")
    ...     optimizer.zero_grad()
    ...     del loss
    >>> print(recorder.result())

    Args:
        model: whose parameters, buffers and modules are meant.
        batch: anything with tensors.
        optimizers: those with state.
    """

    def __init__(self, model: nn.Module, batch: Any = None, *optimizers: Optimizer) -> None:
        self.layout, self.optimizers = Layout(model), optimizers
        self.places = Places(self.layout.paths, self._on_call)
        self.ledger = Ledger(lambda: self.places.here, list(model.parameters()))
        existing: dict[str, Any] = {
            PARAMETERS: list(model.parameters()),
            BUFFERS: list(model.buffers()),
            BATCH: batch,
            STATE: [list(state_tensors(optimizer)) for optimizer in optimizers],
            GRADIENTS: [p.grad for p in model.parameters()],
        }
        for kind, tensors in existing.items():
            self.ledger.note_existing(tensors, Owner(kind))
        self.head: str | None = None
        self.trained: set[Tensor] = set()  # parameters that have got a gradient
        self._model = model
        modules = model.named_modules()
        self._with_parameters = {path for path, m in modules if any(True for _ in m.parameters(recurse=False))}
        self._loss_begins = 0
        self._ends: dict[str, int] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for p in self._model.parameters():
            if p.requires_grad:
                self._hooks.callback(p.register_post_accumulate_grad_hook(self._on_gradient).remove)
        self._hooks.enter_context(self.places.watch())
        self._hooks.enter_context(self.ledger)
        return self

    def __exit__(self, *error: Any) -> None:
        for optimizer in self.optimizers:
            self.ledger.assign(list(state_tensors(optimizer)), Owner(STATE))
        self.ledger.notice_resharding()
        self._ends["step"] = self.ledger.time
        self._hooks.close()
        self.ledger.close()

    def end(self, part: str) -> None:
        """Note that "forward", "backward" or "optimizer" has ended."""
        if part == "forward":
            self._assign_streams()
        if part == "backward":
            self.trained |= {p for p in self._model.parameters() if p.grad is not None}
        self.ledger.notice_resharding()
        self._ends[part] = self.ledger.time
        self.places.is_backward = part == "forward"

    @property
    def is_complete(self) -> bool:
        """Whether all parts of the step have been run."""
        return {"forward", "backward", "optimizer"} <= self._ends.keys()

    def result(self) -> Memory:
        """Return the bytes of the step, which has ended."""
        times = Times(self._loss_begins, *[self._ends[part] for part in ("forward", "backward", "optimizer", "step")])
        books = Bookkeeper(self.layout, times, self.head)
        shares = tuple(books.share(entry) for entry in self.ledger.entries)
        intervals = {
            "after forward": (times.forward, times.forward),
            "highest in backward": (times.forward, times.backward),
            "highest in the optimizer": (times.backward, times.optimizer),
            "between steps": (times.end, times.end),
            "highest of all": (0, times.end),
        }
        *moments, highest = [moment(name, shares, *interval) for name, interval in intervals.items()]
        return Memory(tuple(moments), highest, shares, times, dict(self.layout.sizes))

    def _on_call(self, path: str, begins: bool, values: Any) -> None:
        if path in (self.layout.starts if begins else self.layout.ends):
            self.ledger.assign(_first_tensor(values), Owner(STREAMS, self.layout.stack_of(path) or ""))
        if begins and path in self._with_parameters:
            self.head = path if self.layout.stack_of(path) is None else None
            self._loss_begins = self.ledger.time

    def _assign_streams(self) -> None:
        """Assign what a swapped list holds besides its output: the other stream, which its last layers have made."""
        for path, last in self.layout.last_two.items():
            if isinstance(self._model.get_submodule(path), Layerwise):
                sizes = {e.size for e in self.ledger.alive() if e.owner == (STREAMS, path)}
                for entry in self.ledger.alive():
                    if entry.place in last and entry.owner is None and entry.size in sizes:
                        entry.owner = Owner(STREAMS, path)

    def _on_gradient(self, parameter: Tensor) -> None:
        self.trained.add(parameter)
        self.ledger.assign(parameter.grad, Owner(GRADIENTS))


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state, and of those that it wraps."""
    for each in wrapped(optimizer):
        yield from (t for t in pytree.tree_leaves(list(each.state.values())) if isinstance(t, Tensor))


def _first_tensor(values: Any) -> Tensor | None:
    return next((t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)), None)
