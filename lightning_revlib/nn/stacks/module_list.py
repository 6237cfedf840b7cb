"""A list of layers that its model's own forward calls one by one, run reversibly.

A `LayerProxy` stands in for each layer's `forward`. It takes the model's call with all its arguments, runs the layer as
a step on two streams, and returns what the layer returns, with the stream in the place of its first output. Between the
layers the model sees one stream, b; the list keeps the other:

    a, b = start(x); for each layer: a, b = coupling(a, b, layer(b, ...)), the model gets b; at the last finish(a, b)

Masks, position embeddings, tuples, hooks, keys and parameters stay what they were.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.compilation import compiled_by
from lightning_revlib.nn.internals import graph_task, in_transform, is_exporting
from lightning_revlib.nn.stacks.build import steps_of
from lightning_revlib.nn.stacks.list_forward import ListForward, describe, has_cache, same_memory, without_cache
from lightning_revlib.nn.stacks.options import StackOptions
from lightning_revlib.nn.stacks.reversible import Reversible, run_eagerly
from lightning_revlib.nn.steps.outputs import replace_first, split_output
from lightning_revlib.nn.steps.step import Step

ORDER = (
    "the layers of a reversible list run once each, in their order. A model that skips layers or repeats them"
    " cannot be swapped; set model.config.layerdrop = 0 if it has one; lightning_revlib.restore(model) undoes the swap"
)


class LayerProxy:
    """Stands in for the forward of one layer: an attribute of the layer, whose class and hooks stay."""

    def __init__(self, owner: Layerwise, module: nn.Module) -> None:
        self.owner, self.module = owner, module
        self.inner: Any = vars(module).get("forward")  # a stand-in of somebody else's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.owner, Layerwise) or proxy_of(self.module) not in (self, None):
            return self.original()(*args, **kwargs)  # what has wrapped this proxy outlived a restore or another swap
        call = self.owner.call if is_exporting() else self.owner.call_eagerly
        return call(self, args, kwargs)

    def release(self) -> None:
        """Give the layer its own forward back."""
        del self.module.forward
        if self.inner is not None:
            self.module.forward = self.inner

    def original(self) -> Any:
        return self.inner or partial(type(self.module).forward, self.module)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the stream, which may be given by name, and the other arguments."""
        if args:
            return args[0], args[1:], kwargs
        name = next(iter(inspect.signature(self.original()).parameters), "")
        if name not in kwargs:
            raise TypeError(f"{self.owner.name_of(self.module)} was called without its first argument, the stream")
        return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def proxy_of(layer: nn.Module) -> LayerProxy | None:
    """Return the proxy that stands in for the layer's forward, if one does."""
    forward = layer.__dict__.get("forward")  # Dynamo of torch 2.8 knows no `vars`
    return forward if isinstance(forward, LayerProxy) else None


class Layerwise(Reversible):
    """A container with a proxy for each of its layers; see `ReversibleModuleList`."""

    path = "layers"
    _forwards: dict[int, ListForward]  # by thread

    def set_options(self, options: StackOptions) -> None:
        """Take the options and stand in for the layers; ValueError or TypeError before anything has changed."""
        if options.split_dim is not None:
            raise ValueError(
                f"split_dim={options.split_dim!r}: layers that their model calls see the whole stream; leave it out"
            )
        if not len(self):
            raise ValueError(f"{type(self).__name__} got no blocks; pass at least one module")
        self.check_blocks()
        for layer in self:
            if (proxy := proxy_of(layer)) and proxy.owner is not self:
                raise ValueError(
                    f"{self.name_of(layer)} is a layer of {proxy.owner.path}, too, which runs it reversibly; a layer"
                    " can be in one reversible list only: leave one of them as it is, or give it copies made"
                    " before the swap, or after lightning_revlib.restore(model)"
                )
        super().set_options(options)
        self._forwards = {}
        for layer in list(self)[options.ordinary :]:
            if proxy_of(layer) is None:
                layer.forward = LayerProxy(self, layer)

    def release(self) -> None:
        """Give the layers their own forward back."""
        for layer in self:
            if proxy := proxy_of(layer):
                proxy.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": {}}

    def __iter__(self) -> Iterator[nn.Module]:
        return map(self._own, super().__iter__())

    def _own(self, layer: nn.Module) -> nn.Module:
        """Return a layer. Raises RuntimeError if it would run another list's layer."""
        if (proxy := proxy_of(layer)) and proxy.module is not layer:
            raise RuntimeError(
                f"{self.path}: a copy of a reversible list attribute by attribute, such as one of the package"
                " higher, has layers that run with the original weights; take torch.func.functional_call,"
                " copy.deepcopy, or undo the swap by lightning_revlib.restore(model)"
            )
        return layer

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            f"{self.path}: nn.DataParallel cannot copy a reversible list, whose layers would keep the original weights;"
            " take nn.parallel.DistributedDataParallel, or undo the swap by lightning_revlib.restore(model)"
        )

    def call(self, proxy: LayerProxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, called by the model, in place of its forward."""
        thread = threading.get_ident()
        forward = self._forwards.pop(thread, None)  # put back when the layer has run: an error ends the forward
        with compiled_by(None) as compiler:
            x, args, kwargs = proxy.first(args, kwargs)
            if forward is None or not self._continues(forward, proxy.module, x):
                forward = self._begin(proxy.module, x)
            # The first layers may have run under no_grad.
            if forward.run is None and not forward.is_ordinary and torch.is_grad_enabled():
                self._record(forward, proxy.module, args, kwargs, compiler)
            if forward.run is not None:
                args, kwargs = without_cache(args, kwargs, self.path)
            out = self._advance(forward, self._steps(forward.index, proxy, x.dtype, args, kwargs), compiler)
            if forward.index < len(self):
                self._forwards[thread] = forward
            return out

    call_eagerly = run_eagerly(call)

    def name_of(self, layer: nn.Module) -> str:
        key = next(key for key, m in self._modules.items() if m is layer)
        return f"{self.path}.{key} ({type(layer).__name__})"

    def _steps(self, index: int, proxy: LayerProxy, dtype: torch.dtype, args: Any, kwargs: Any) -> list[Step]:
        """Return the steps of the layer of that number."""
        key, number = list(self._modules)[index], index - self.options.ordinary
        return steps_of(self, number, key, proxy.module, dtype, (args, kwargs), proxy.original(), _split_layer_output)

    def _advance(self, forward: ListForward, steps: list[Step], compiler: Any) -> Any:
        last = steps[-1]
        try:
            for step in steps:
                forward.step(step, compiler)
            forward.next_layer()
            if forward.index < len(self):
                out = forward.hand(last.dtype)
            else:
                out = self._finish(forward).to(last.dtype)
            extra = last.take_extra()
            return out if extra is None else replace_first(extra, out)
        finally:
            for step in steps:
                step.take_extra()

    def _finish(self, forward: ListForward) -> Tensor:
        if forward.run is None:
            return self.join(forward.a, forward.b)
        return self.end_run(forward.run, forward.a, forward.b)

    def _begin(self, layer: nn.Module, x: Any) -> ListForward:
        """Begin a forward with its first layer; another one may have been given up before."""
        first = self[self.options.ordinary]
        if layer is not first:
            raise self._out_of_order(layer, f"before {self.name_of(first)}")
        layers = list(self)[self.options.ordinary :]
        if len(self.treatments) != len(self) or any(proxy_of(m) is None for m in layers):
            raise RuntimeError(
                f"{self.path}: its layers are others than when it was swapped, or the forward of one; call swap again"
            )
        return ListForward(self.options.ordinary, *self.split(x))

    def _record(self, forward: ListForward, layer: nn.Module, args: Any, kwargs: Any, compiler: Any) -> None:
        """Run the layers from this one on reversibly, unless the call is one that cannot."""
        self._check_recording(layer)
        if is_exporting() or has_cache(args, kwargs, self.path):
            forward.stay_ordinary()
        else:
            forward.record(self.new_run(None, compiler, first=forward.steps))

    def _check_recording(self, layer: nn.Module) -> None:
        """Raise RuntimeError or ValueError if something else would run layers by its own rules."""
        if in_transform():
            raise RuntimeError(
                "torch.func transforms cannot run reversible layers, since they allow no saved-tensor hooks;"
                " lightning_revlib.restore(model) makes them ordinary ones, with the same parameters"
            )
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            if type(layer).__call__ is not nn.Module.__call__:  # layers of transformers up to version 5.22
                raise ValueError(
                    f"{self.name_of(layer)}: gradient checkpointing is on, and would call the layers of a reversible"
                    " list a second time; they hold nothing already: model.gradient_checkpointing_disable()"
                )
            warnings.warn(
                f"{self.path}: gradient checkpointing is on, and runs layers a third time; a reversible list holds"
                " nothing of them already: model.gradient_checkpointing_disable()",
                stacklevel=2,
            )

    def _out_of_order(self, layer: nn.Module, what: str) -> ValueError:
        if graph_task() < 0:
            return ValueError(f"{self.name_of(layer)} was called {what}: {ORDER}")
        return ValueError(
            f"{self.name_of(layer)} was called again in backward, by a checkpoint around it; turn that off, since a"
            " reversible list decides itself what its layers hold, by the option `treatments`"
        )

    def _continues(self, forward: ListForward, layer: nn.Module, x: Any) -> bool:
        """Return whether the call continues the forward; False if it begins another. Raises ValueError else."""
        first = self[self.options.ordinary]
        last, due = self[forward.index - 1], self[forward.index]
        if due is not layer:
            if layer is first and not (isinstance(x, Tensor) and same_memory(x, forward.handed)):
                return False  # the last forward was given up
            what = "a second time" if layer is last else f"where {self.name_of(due)} was due"
            raise self._out_of_order(layer, f"{what}, after {self.name_of(last)}")
        if forward.continues_with(x):
            return True
        if layer is first:
            return False
        raise ValueError(
            f"{self.name_of(layer)} was called with something else than what {self.name_of(last)} had"
            f" returned ({describe(forward.handed)}, now {describe(x)}): between the layers of a reversible list the"
            " model may do nothing, such as adding a skip connection or position embeddings. It cannot be swapped;"
            " lightning_revlib.restore(model) undoes the swap"
        )


def _split_layer_output(out: Any) -> tuple[Any, Any]:
    """Return a layer's branch and all that it returned, for another branch to be put in its place."""
    return split_output(out)[0], replace_first(out, None)


class ReversibleModuleList(Layerwise, nn.ModuleList):
    """An `nn.ModuleList` whose layers run reversibly when its model calls them in their order.

    >>> layers = ReversibleModuleList([nn.Linear(8, 8) for _ in range(64)], coupling="midpoint")
    >>> x = torch.randn(4, 8)
    >>> for layer in layers:
    ...     x = layer(x)
    >>> x.sum().backward()

    The model must call each layer once, in order, with what the previous layer returned. Gradients are those of the
    same loop by ordinary autograd. The loop itself runs if gradients are off, or with ``store_last=len(layers)``.
    `swap` makes one of an nn.ModuleList, `restore` an nn.ModuleList of it. Hidden states that the model reads between
    the layers stay in memory if their readers keep them, as in ordinary autograd.

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
        self.set_options(StackOptions(**{"split_dim": None, **options}))

    def __repr__(self) -> str:
        name, layers = super().__repr__().split("(", 1)  # an nn.ModuleList does not ask for its `extra_repr`
        return f"{name}(\n  {self.extra_repr()}{layers}"

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else self._own(super().__getitem__(index))


class IteratedSequential(Layerwise, nn.Sequential):
    """The same for an `nn.Sequential` whose blocks are called one by one: by `swap` with ``iterated=True``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return self._own(super().__getitem__(index))
