"""A list of layers that its model's own forward calls one by one, run reversibly.

The layers' `forward` is stood in for by a `Layer`, which takes the model's call with all its arguments, runs the layer
as a step on two streams, and returns what the layer returns, with the stream in the place of its first output. Between
the layers the model sees one stream, b; the list keeps the other:

    a, b = start(x); for each layer: a, b = coupling(a, b, layer(b, ...)), the model gets b; at the last finish(a, b)

Masks, position embeddings, tuples, hooks, keys and parameters stay what they were.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.stacks.build import steps_of
from lightning_revlib.nn.stacks.layer import Layer, Run, cached, describe, same_memory, without_cache
from lightning_revlib.nn.stacks.options import Treatment
from lightning_revlib.nn.stacks.reversible import Reversible
from lightning_revlib.nn.stacks.sequential import CoupledSequential
from lightning_revlib.nn.steps.branches import BranchSpec
from lightning_revlib.nn.steps.step import Step, rest_of, with_first
from lightning_revlib.nn.treatments.run import Execution


class _LayerStep(Step):
    __slots__ = ()

    def split(self, out: Any) -> tuple[Any, Any]:
        return rest_of(out)[0], with_first(out, None)


class Layerwise(Reversible):
    """A container whose layers are stood in for; see `ReversibleModuleList`."""

    if TYPE_CHECKING:  # of the containers
        training: bool

        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[nn.Module]: ...
        def __getitem__(self, index: Any) -> Any: ...

    _modules: dict[str, Any]
    OPTIONS = (*CoupledSequential.OPTIONS, "_runs")
    _step: type[Step] = _LayerStep
    path = "layers"
    listed = True
    couplings: tuple[Coupling, ...]
    treatments: tuple[Treatment, ...]
    ordinary: int
    branches: tuple[BranchSpec, ...]

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Take the options and stand in for the layers; ValueError or TypeError before anything has changed."""
        if options.get("split_dim") is not None:
            raise ValueError(
                f"split_dim={options['split_dim']!r}: layers that their model calls see the whole stream; leave it out"
            )
        for layer in self:
            stand_in = layer.__dict__.get("forward")
            if isinstance(stand_in, Layer) and stand_in.owner is not self:
                raise ValueError(
                    f"{self._name(layer)} is a layer of {stand_in.owner.path}, too, which runs it reversibly; a layer"
                    " can be in one reversible list only: leave one of them as it is, or give it copies of the layers"
                )
        template = CoupledSequential(OrderedDict(self._modules), **{**options, "split_dim": None})
        self.__dict__.update({name: template.__dict__[name] for name in CoupledSequential.OPTIONS})
        self._runs: dict[int, Run] = {}  # by thread
        for layer in list(self)[self.ordinary :]:
            if not isinstance(layer.__dict__.get("forward"), Layer):
                layer.forward = Layer(self, layer)

    def release(self) -> None:
        """Give the layers their own forward back."""
        for layer in self:
            stand_in = layer.__dict__.get("forward")
            if isinstance(stand_in, Layer):
                del layer.forward
                if stand_in.inner is not None:
                    layer.forward = stand_in.inner

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}

    def call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer's call by the model, in place of its forward."""
        compiler = set_eval_frame(None)
        thread = threading.get_ident()
        run = self._runs.pop(thread, None)  # back when the layer has run: an error ends the run
        try:
            x, args, kwargs = layer.first(args, kwargs)
            run = self._go_on(run, layer.module, x) or self._begin(layer.module, x, (args, kwargs), compiler)
            if run.execution is not None:
                args, kwargs = without_cache((args, kwargs), self.path)
            key, first = list(self._modules)[run.index], (run.index - self.ordinary) * (len(self.branches) or 1)
            steps = steps_of(self, run.index, first, key, layer.module, x.dtype, (args, kwargs))
            if not self.branches:
                steps[0].call = layer.original()
            out = self._advance(run, steps, compiler)
            if run.index < len(self):
                self._runs[thread] = run
            return out
        finally:
            set_eval_frame(compiler)

    call_eagerly = torch.compiler.disable(call, recursive=False)

    def _advance(self, run: Run, steps: list[Step], compiler: Any) -> Any:
        run.index += 1
        for step in steps:
            if run.execution is None:
                run.a, run.b = step.run(run.a, run.b, compiler)
            else:
                run.a, run.b = run.execution.step(step, run.a, run.b)
        if run.index < len(self):
            out = run.hand(step.dtype, step.name)
        else:
            if run.execution is not None:
                run.a, run.b = run.execution.close(run.a, run.b)
                self.__dict__["_draws"] = run.execution.drew
            out = self._join(run.a, run.b).to(step.dtype)  # type: ignore[misc]
            if run.execution is not None:
                run.execution.end(out)
        extra, step.extra = step.extra, None  # it refers to the graph, which refers to the step
        return out if extra is None else with_first(extra, out)

    def _begin(self, layer: nn.Module, x: Any, call: Any, compiler: Any) -> Run:
        if len(self.treatments) != len(self) or any(
            not isinstance(m.__dict__.get("forward"), Layer) for m in list(self)[self.ordinary :]
        ):
            raise RuntimeError(f"{self.path}: its layers are others than when it was swapped; call swap again")
        if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "torch.func transforms cannot run reversible layers, since they allow no saved-tensor hooks;"
                " lightning_revlib.restore(model) makes them ordinary ones, with the same parameters"
            )
        if torch.is_grad_enabled() and layer.training and _checkpointed(layer):
            raise ValueError(
                f"{self._name(layer)}: gradient checkpointing is on, and would call the layers of a reversible list a"
                " second time; they hold nothing already: model.gradient_checkpointing_disable()"
            )
        run = Run(self.ordinary)
        run.a, run.b = self._split(x)  # type: ignore[misc]
        if torch.is_grad_enabled() and not torch.compiler.is_exporting() and not cached(call, self.path):
            run.execution = Execution(self, compiler, (len(self) - self.ordinary) * (len(self.branches) or 1))
        return run

    def _go_on(self, run: Run | None, layer: nn.Module, x: Any) -> Run | None:
        """The run, if the call continues it; None if it begins one; an error else."""
        first = self[self.ordinary]
        if run is None:
            if layer is not first:
                raise ValueError(f"{self._name(layer)} was called before {self._name(first)}: {ORDER}")
            return None
        if self[run.index] is not layer:
            if layer is first and not (isinstance(x, Tensor) and same_memory(x, run.handed)):
                return None  # the last forward was given up
            last, due = self[run.index - 1], self._name(self[run.index])
            what = "a second time" if layer is last else f"where {due} was due"
            raise ValueError(f"{self._name(layer)} was called {what}, after {self._name(last)}: {ORDER}")
        if not run.continues_with(x):
            if layer is first:
                return None
            raise ValueError(
                f"{self._name(layer)} was called with something else than what {self._name(self[run.index - 1])} had"
                f" returned ({describe(run.handed)}, now {describe(x)}): between the layers of a reversible list the"
                " model may do nothing, such as adding a skip connection or position embeddings. It cannot be swapped;"
                " lightning_revlib.restore(model) undoes the swap"
            )
        return run

    def _name(self, layer: nn.Module) -> str:
        key = next(key for key, m in self._modules.items() if m is layer)
        return f"{self.path}.{key} ({type(layer).__name__})"

    _split, _join = CoupledSequential._split, CoupledSequential._join


class ReversibleModuleList(Layerwise, nn.ModuleList):
    """An `nn.ModuleList` whose layers run reversibly when its model calls them in their order.

    >>> layers = ReversibleModuleList([nn.Linear(8, 8) for _ in range(64)], coupling="midpoint")
    >>> x = torch.randn(4, 8)
    >>> for layer in layers:
    ...     x = layer(x)
    >>> x.sum().backward()

    The model must call each layer once, in order, with what the one before returned. Gradients are
    those of the same loop by ordinary autograd, which is what runs with all layers stored,
    ``store_last=len(layers)``, and where gradients are off. `swap` makes one of an nn.ModuleList,
    `restore` an nn.ModuleList of it. Not for models that read the hidden states between the layers.

    Args:
        modules: the layers. The first argument of each is the stream, of unchanging shape; what it
            returns is the stream, or a tuple, dict or dataclass that begins with it.
        **options: of `CoupledSequential`; `split_dim` is None, and `residual=True` keeps the skip
            connection which layers of existing models contain.

    Raises:
        ValueError, TypeError: for wrong options; when layers are called, for another order, another
            input, or a layer that changes the stream's shape. Errors name the layer by its path.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), **options: Any) -> None:
        super().__init__(modules)
        self.set_options(options)

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class IteratedSequential(Layerwise, nn.Sequential):
    """The same for an `nn.Sequential` whose blocks are called one by one: by `swap` with ``iterated=True``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


ORDER = (
    "the layers of a reversible list run once each, in their order. A model that skips or repeats layers cannot be"
    " swapped; lightning_revlib.restore(model) undoes the swap"
)


def _checkpointed(layer: nn.Module) -> bool:
    """Whether transformers' layers, up to 5.22 or so, checkpoint their whole call; later ones do so inside of it."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and type(layer).__call__ is not nn.Module.__call__
