"""The head of a causal model puts off its logits, so that the model's own loss is computed by chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial, partialmethod, reduce
from operator import attrgetter, methodcaller
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.plan.budget import Budget
from lightning_revlib.pretrained.loss import TOKENS, check_tokens, chunked_cross_entropy
from lightning_revlib.pretrained.planned_loss import count_loss, expecting_budgets


def chunk_loss(model: nn.Module, tokens: int | None = TOKENS) -> None:
    """Make a causal model of transformers compute its loss in training by chunks of `tokens` tokens.

    >>> chunk_loss(model)
    >>> model(input_ids=ids, labels=ids).loss.backward()

    It works for any loss that is `F.cross_entropy` of the logits, with the tokens shifted and flattened in any of the
    usual ways. Factors, casts and softcaps between head and loss are kept. The logits that the model returns are
    computed when something reads them. In evaluation, and with gradients off, nothing changes.
    ``chunk_loss(model, tokens=None)`` undoes it.

    Raises TypeError if the model does not say which module is its head, ValueError for other `tokens` than at least 1.
    """
    if tokens is not None:
        check_tokens(tokens)
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise TypeError(
            f"{type(model).__name__} does not say which module is its head, by get_output_embeddings(); call"
            " chunked_cross_entropy(hidden, head, labels) in its place"
        )
    stand_in = vars(model).get("forward")
    if isinstance(stand_in, ChunkedForward):
        del model.forward
        if stand_in.inner is not None:
            model.forward = stand_in.inner
    if tokens is not None:
        model.forward = ChunkedForward(model, tokens)


class ChunkedForward:
    """Stands in for the forward of a model with `chunk_loss`."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model, self.tokens, self.inner = model, tokens, vars(model).get("forward")

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for its signature, which trainers read
        return self.inner or partial(type(self.model).forward, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.model.training and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        head = self.model.get_output_embeddings()  # type: ignore[operator]  # PEFT may have replaced it
        former = vars(head).get("forward")
        loss = partial(self._loss, head, expecting_budgets(self.model))
        head.forward = partial(LazyLogits, former or partial(type(head).forward, head), head.weight.shape[0], loss)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            del head.forward
            if former is not None:
                head.forward = former

    def _loss(
        self,
        head: nn.Module,
        budgets: Sequence[Budget],
        hidden: Tensor,
        compute: Callable[[Tensor], Tensor],
        labels: Tensor,
        **options: Any,
    ) -> Tensor:
        """Return the loss of hidden states, and count it in the budgets of the model's stacks."""

        def loss(hidden: Tensor) -> Tensor:
            return chunked_cross_entropy(hidden, compute, labels, tokens=self.tokens, **options)

        for budget in budgets:
            count_loss(budget, loss, hidden, head, self.tokens)
        return loss(hidden)


class LazyLogits:
    """Stands in for the logits that the head of a model with `chunk_loss` returns in training.

    `F.cross_entropy` of it runs by chunks. What a model does to each row before (a factor, a softcap, a cast, a bias)
    is noted in `then`, and done to each chunk. Any other use computes the logits as a tensor, `whole`.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        classes: int,
        loss: Callable[..., Tensor],  # of hidden states, a function that computes their logits, and labels
        hidden: Tensor,
        then: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> None:
        self.head, self.classes, self.loss, self.hidden, self.then = head, classes, loss, hidden, then

    @cached_property
    def whole(self) -> Tensor:
        """The logits."""
        return self.compute(self.hidden)

    def compute(self, hidden: Tensor) -> Tensor:
        """Return the logits of some rows."""
        return reduce(lambda logits, operation: operation(logits), self.then, self.head(hidden))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:  # to which losses move the labels
        return self.hidden.device

    def view(self, *shape: Any) -> Any:
        if shape in ((-1, self.classes), (self.hidden.shape[:-1].numel(), self.classes)):
            return self._of_rows(self.hidden.reshape(-1, self.hidden.shape[-1]))
        return self.whole.reshape(*shape)

    reshape = view

    def contiguous(self) -> LazyLogits:
        return self

    def float(self) -> LazyLogits:
        return self._and_then(Tensor.float)

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        return self._and_then(methodcaller("to", *args, **kwargs))

    def __add__(self, bias: Any) -> Any:
        is_of_classes = (
            isinstance(bias, Tensor)
            and 1 <= bias.ndim <= self.hidden.ndim
            and bias.numel() == self.classes == bias.shape[-1]
        )
        return self._and_then(lambda logits: logits + bias.flatten()) if is_of_classes else self.whole + bias

    def __mul__(self, factor: Any) -> Any:
        return (
            self._and_then(lambda logits: logits * factor) if isinstance(factor, (int, float)) else self.whole * factor
        )

    def __truediv__(self, divisor: Any) -> Any:
        return (
            self._and_then(lambda logits: logits / divisor)
            if isinstance(divisor, (int, float))
            else self.whole / divisor
        )

    def __getitem__(self, index: Any) -> Any:
        match index:
            case (EllipsisType(), slice(), slice(start=None, stop=None, step=None)):  # all but the last token, say
                return self._of_rows(self.hidden[index])
        return self.whole[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tanh and isinstance(args[0], cls):
            return args[0]._and_then(torch.tanh)
        if func is functional.cross_entropy and isinstance(args[0], cls):
            logits, *rest = args
            options = {name: x for name, x in kwargs.items() if x is not None}  # torch passes all, None for most
            if logits._has_chunks(*rest, **options):
                return logits.loss(logits.hidden, logits.compute, *rest, **options)
        args, kwargs = pytree.tree_map_only(cls, attrgetter("whole"), (args, kwargs))
        return func(*args, **kwargs)

    def _has_chunks(self, target: Tensor, *args: Any, reduction: str = "mean", **options: Any) -> bool:
        """Return whether a cross-entropy with these arguments runs by chunks."""
        known = options.keys() <= {"ignore_index", "label_smoothing"}
        return self.hidden.ndim == 2 and not target.is_floating_point() and not args and known and reduction != "none"

    def _and_then(self, operation: Callable[[Tensor], Tensor]) -> LazyLogits:
        return LazyLogits(self.head, self.classes, self.loss, self.hidden, (*self.then, operation))

    def _of_rows(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits(self.head, self.classes, self.loss, hidden, self.then)


# Operators, which Python looks up in the class, and not by `__getattr__`.
OPERATORS = (
    "abs bool eq float floordiv ge gt iter le len lt matmul mod ne neg pos pow"
    " radd rfloordiv rmatmul rmod rmul rpow rsub rtruediv setitem sub"
)
for _name in [f"__{operator}__" for operator in OPERATORS.split()]:
    setattr(LazyLogits, _name, partialmethod(lambda logits, name, *args: getattr(logits.whole, name)(*args), _name))
