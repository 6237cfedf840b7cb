"""A list of layers that its model's own forward calls one by one, run reversibly.

The layers' `forward` is stood in for by a `Layer`, which takes the model's call with all its arguments, runs the layer
as a step on two streams, and returns what the layer returns, with the stream in the place of its first output. Between
the layers the model sees one stream, b; the list keeps the other:

    a, b = start(x); for each layer: a, b = coupling(a, b, layer(b, ...)), the model gets b; at the last finish(a, b)

Masks, position embeddings, tuples, hooks, keys and parameters stay what they were.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.branches import BranchSpec
from lightning_revlib.nn.coupling import Coupling
from lightning_revlib.nn.execution import Execution, Reversible
from lightning_revlib.nn.options import Treatment
from lightning_revlib.nn.sequence import CoupledSequential
from lightning_revlib.nn.step import Step, rest_of, with_first


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
        template = CoupledSequential(OrderedDict(self._modules), **{**options, "split_dim": None})
        self.__dict__.update({name: template.__dict__[name] for name in CoupledSequential.OPTIONS})
        self._runs: dict[int, _Run] = {}  # by thread
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

    def extra_repr(self) -> str:
        return f"coupling={self.couplings[0] if len(self.couplings) == 1 else list(self.couplings)}"

    def call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer's call by the model, in place of its forward."""
        compiler = set_eval_frame(None)
        thread = threading.get_ident()
        run = self._runs.pop(thread, None)  # back when the layer has run: an error ends the run
        try:
            x, args, kwargs = layer.first(args, kwargs)
            run = self._go_on(run, layer.module, x) or self._begin(layer.module, x, (args, kwargs), compiler)
            if run.execution is not None:
                args, kwargs = _without_cache((args, kwargs), self.path)
            key, first = list(self._modules)[run.index], (run.index - self.ordinary) * (len(self.branches) or 1)
            steps = self._steps_of(run.index, first, key, layer.module, x.dtype, (args, kwargs))  # type: ignore[misc]
            if not self.branches:
                steps[0].call = layer.original()
            out = self._advance(run, steps, compiler)
            if run.index < len(self):
                self._runs[thread] = run
            return out
        finally:
            set_eval_frame(compiler)

    call_eagerly = torch.compiler.disable(call, recursive=False)

    def _advance(self, run: _Run, steps: list[Step], compiler: Any) -> Any:
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
                self._draws = run.execution.drew
            out = self._join(run.a, run.b).to(step.dtype)  # type: ignore[misc]
            if run.execution is not None:
                run.execution.end_plan(out)
        extra, step.extra = step.extra, None  # it refers to the graph, which refers to the step
        return out if extra is None else with_first(extra, out)

    def _begin(self, layer: nn.Module, x: Any, call: Any, compiler: Any) -> _Run:
        if len(self.treatments) != len(self) or any(
            not isinstance(m.__dict__.get("forward"), Layer) for m in list(self)[self.ordinary :]
        ):
            raise RuntimeError(f"{self.path}: its layers are others than when it was swapped; call swap again")
        if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "torch.func transforms cannot run reversible layers, since they allow no saved-tensor hooks;"
                " lightning_revlib.restore(model) makes them ordinary ones, with the same parameters"
            )
        run = _Run(self.ordinary)
        run.a, run.b = self._split(x)  # type: ignore[misc]
        if torch.is_grad_enabled() and not torch.compiler.is_exporting() and not _cached(call, self.path):
            run.execution = Execution(self, compiler, (len(self) - self.ordinary) * (len(self.branches) or 1))
        return run

    def _go_on(self, run: _Run | None, layer: nn.Module, x: Any) -> _Run | None:
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
                f" returned ({_describe(run.handed)}, now {_describe(x)}): between the layers of a reversible list the"
                " model may do nothing, such as adding a skip connection or position embeddings. It cannot be swapped;"
                " lightning_revlib.restore(model) undoes the swap"
            )
        return run

    def _name(self, layer: nn.Module) -> str:
        key = next(key for key, m in self._modules.items() if m is layer)
        return f"{self.path}.{key} ({type(layer).__name__})"

    _split, _join, _steps_of = CoupledSequential._split, CoupledSequential._join, CoupledSequential._steps_of


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
        return (
            nn.Sequential(OrderedDict(list(self._modules.items())[index]))
            if isinstance(index, slice)
            else (super().__getitem__(index))
        )


ORDER = (
    "the layers of a reversible list run once each, in their order. A model that skips or repeats layers cannot be"
    " swapped; lightning_revlib.restore(model) undoes the swap"
)


class Layer:
    """Stands in for the forward of one layer: an attribute of the object, so that its class and its hooks stay."""

    def __init__(self, owner: Layerwise, module: nn.Module) -> None:
        self.owner, self.module = owner, module
        self.inner: Any = module.__dict__.get("forward")  # another's stand-in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.owner.call if torch.compiler.is_exporting() else self.owner.call_eagerly
        return call(self, args, kwargs)

    def original(self) -> Any:
        return self.inner or partial(type(self.module).forward, self.module)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The stream and the other arguments; it may be given by name."""
        if args:
            return args[0], args[1:], kwargs
        name = next(iter(inspect.signature(self.original()).parameters), "")
        if name not in kwargs:
            raise TypeError(f"{self.owner._name(self.module)} was called without its first argument, the stream")
        return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


class _Run:
    """One forward through a list: the streams, and what the model was handed of them."""

    def __init__(self, index: int) -> None:
        self.index = index  # of the layer that is due
        self.execution: Execution | None = None  # without, ordinary operations
        self.a: Tensor
        self.b: Tensor
        self.handed: Any = None
        self.count = 0  # its version
        self.guard: Any = None

    def hand(self, dtype: torch.dtype, name: str) -> Tensor:
        """Stream b for the model: in a graph, a node of its own, through which gradients come only if it is read."""
        b = self.b
        self.handed = b.to(dtype) if b.dtype is not dtype else b.view_as(b) if self.execution else b
        self.count = 0 if self.handed.is_inference() else self.handed._version
        if self.execution and self.execution.recording and self.handed.requires_grad:
            self.guard = self.handed.register_hook(partial(_read_between, name))
        return self.handed

    def continues_with(self, x: Any) -> bool:
        """Whether x is what was handed out, maybe passed through hooks as FSDP's, which then get their gradients."""
        handed, guard = self.handed, self.guard
        self.handed = self.guard = None
        if x is handed:
            pass
        elif isinstance(x, Tensor) and same_memory(x, handed):
            if guard is not None:
                guard.remove()
            # its value is b's, exactly, its gradient is x's
            self.b = x if x.dtype is self.b.dtype else x.to(self.b.dtype) + (self.b - x.to(self.b.dtype)).detach()
        else:
            self.handed = handed
            return False
        if not x.is_inference() and x._version != self.count:
            raise RuntimeError(
                f"a hidden state of shape {list(x.shape)} was modified in place between two layers of a reversible"
                " list; such a model cannot be swapped"
            )
        return True


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one, but for their place in the graph."""
    return (
        (x.shape, x.stride(), x.dtype, x.storage_offset()) == (y.shape, y.stride(), y.dtype, y.storage_offset())
        and x.device == y.device
        and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    )


def _read_between(name: str, grad: Tensor) -> None:
    raise RuntimeError(
        f"what {name} returned is also used by something else than the next layer, as in a feature pyramid, a loss on"
        " hidden states, a skip connection over layers, or a model that leaves the list early: each of them would"
        " stay in memory, and the list cannot be swapped; detach what is read, or undo the swap by restore(model)"
    )


def _caches(call: Any) -> list[Any]:
    args, kwargs = call
    return [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]


def _cached(call: Any, path: str) -> bool:
    """Whether the call brings keys and values of before: then the layers are stored, as they would append twice."""
    if not (cached := any(cache.get_seq_length() for cache in _caches(call))):
        return False
    warnings.warn(f"{path}: gradients with a cache that is not empty: activations are stored", stacklevel=5)
    return cached


def _without_cache(call: Any, path: str) -> Any:
    """The call without an empty cache: it would keep all layers' keys and values, and a second run append to it."""
    caches = _caches(call)
    if not caches:
        return call
    warnings.warn(f"{path}: the cache stays empty where gradients are recorded; pass use_cache=False", stacklevel=5)
    args, kwargs = call
    dropped = {id(cache) for cache in caches}
    return (
        tuple(None if id(value) in dropped else value for value in args),
        {name: None if id(value) in dropped else value for name, value in kwargs.items()},
    )


def _describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
