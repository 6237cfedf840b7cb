"""Changes of a training step that may save memory. Each has the program changed inside a context, to be counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.accounting.layout import Layout
from lightning_revlib.accounting.optimizer import wrapped
from lightning_revlib.accounting.simulate import GRID
from lightning_revlib.accounting.step import Program, losses_of
from lightning_revlib.nn.convert.call import SILENT
from lightning_revlib.nn.convert.candidates import paste
from lightning_revlib.nn.convert.discover import discover
from lightning_revlib.nn.convert.swap import find, preserve_stacks, stacks, swap_one
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.state.preserve import preserve_state
from lightning_revlib.pretrained.lazy_logits import ChunkedForward, chunk_loss
from lightning_revlib.strategies.optimizer_in_backward import ParameterStep


class Variant(NamedTuple):
    """A change: what it is, the line that makes it, and a context that yields the changed program."""

    name: str
    line: str
    change: AbstractContextManager[Program]


def variants(program: Program) -> Iterator[Variant]:
    """Yield the changes that a program allows."""
    targets = _targets(program)
    if targets is not None:
        paths = ", ".join(targets) or "the stacks"
        line = paste(targets) if targets else "lightning_revlib.swap(model)"
        yield Variant(f"run {paths} reversibly", line, _swapped(program, targets))
    if held := _held(program.model):
        blocks = f"all blocks of {', '.join(held)}" if all(held) else "all blocks"
        yield Variant(f"run {blocks} reversibly, without treatments or a budget", paste(held), _swapped(program, held))
    for path, head in _heads(program.model):
        name = f"model.{path}" if path else "model"
        yield Variant("compute the loss by chunks", f"lightning_revlib.chunk_loss({name})", _chunked(program, head))
    if program.optimizer is not None:
        line = "Trainer(strategy=ReversibleStrategy(optimizer_in_backward=True))"
        yield Variant("step the optimizer in backward", line, _stepped_in_backward(program))
    if path := _largest_outside(program.model):
        line = f'model.get_submodule("{path}").requires_grad_(False)'
        yield Variant(f"freeze {path}", line, _frozen(program, path))
    if _halves(program.batch) is not None:
        line = "Trainer(accumulate_grad_batches=2), with half the batch size"
        yield Variant("split the batch in two", line, _split(program))


def _targets(program: Program) -> Mapping[str, Any] | None:
    """Return what could be swapped: {} for stacks that are built as such, None for nothing."""
    model = program.model
    if stacks(model):
        return None
    if find(model, strict=False):
        return {}
    with preserve_state(model):
        return discover(model, lambda: program.run(program.batch)).targets or None


def _held(model: nn.Module) -> dict[str, Any]:
    """Return the stacks whose treatments or budgets let blocks hold more than reversible ones, with what undoes it.

    A budget that stacks share is their strategy's.
    """
    found = stacks(model).items()
    own = {path for path, stack in found if stack.budget is not None and not stack.budget.paths}
    return {path: {"store_last": 0} for path, s in found if path in own or set(s.step_treatments()) - {"reversible"}}


@contextmanager
def _swapped(program: Program, targets: Mapping[str, Any]) -> Iterator[Program]:
    found = find(program.model, targets or None)
    with preserve_stacks(module for _, module, _ in found):
        for path, module, options in found:
            options = {**(options or {}), **SILENT}
            if options.get("grid_bits") == "auto":
                options["grid_bits"] = GRID
            swap_one(path, module, options)
        yield program


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost causal model that says which module is its head, unless its loss is by chunks."""
    for path, module in model.named_modules():
        get_head = getattr(module, "get_output_embeddings", None)
        if get_head is not None and get_head() is not None:
            if not isinstance(vars(module).get("forward"), ChunkedForward):
                yield path, module
            return


@contextmanager
def _chunked(program: Program, module: nn.Module) -> Iterator[Program]:
    before = vars(module).get("forward")
    budgets = {id(stack.budget): stack.budget for stack in stacks(program.model).values() if stack.budget is not None}
    with ExitStack() as undo:
        for budget in budgets.values():  # they count the loss
            undo.enter_context(budget.on_trial())
        chunk_loss(module)
        try:
            yield program
        finally:
            del module.forward
            if before is not None:
                module.forward = before


@contextmanager
def _stepped_in_backward(program: Program) -> Iterator[Program]:
    assert program.optimizer is not None
    *_, optimizer = wrapped(program.optimizer)  # which steps
    with ExitStack() as hooks:
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    step = ParameterStep(optimizer, index, None)
                    hooks.callback(p.register_post_accumulate_grad_hook(step).remove)
        yield program


def _largest_outside(model: nn.Module) -> str:
    """Return the module outside of stacks with the most parameters that are trained, such as an embedding."""
    layout = Layout(model)
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        path = name.rpartition(".")[0]
        if p.requires_grad and layout.stacks and layout.stack_of(path) is None and path:
            sizes[path] = sizes.get(path, 0) + p.nbytes
    return max(sizes, key=lambda path: sizes[path], default="")


@contextmanager
def _frozen(program: Program, path: str) -> Iterator[Program]:
    parameters = [p for p in program.model.get_submodule(path).parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield program
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _halves(batch: Any) -> tuple[Any, Any] | None:
    """Return the halves of a batch of an even number of samples, else None."""
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    counts = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(counts) != 1 or (count := counts.pop()) < 2 or count % 2:
        return None
    return tuple(pytree.tree_map_only(Tensor, partial(_half, number=number), batch) for number in (0, 1))


def _half(tensor: Tensor, number: int) -> Tensor:
    return tensor.chunk(2)[number]


@contextmanager
def _split(program: Program) -> Iterator[Program]:
    """Have the second half of the batch counted, when the gradients of the first half are there."""

    def run(batch: Any) -> Any:
        first, second = _halves(batch) or (batch, batch)
        losses = losses_of(program.run(first), program.model)
        torch.autograd.backward(losses, [torch.ones_like(y) for y in losses])
        return program.run(second)

    yield program._replace(run=run)
