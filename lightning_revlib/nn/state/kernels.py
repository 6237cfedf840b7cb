"""Flags that choose kernels: attention backends, such as by `torch.nn.attention.sdpa_kernel`, and `torch.backends`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.backends import cuda, cudnn, mkldnn

from lightning_revlib.nn.state.base import Call, State


class Kernels(State):
    """The process-wide flags by which torch chooses kernels; what a kernel saves for its gradient depends on it."""

    shared = True
    __slots__ = ("then",)

    def __init__(self, call: Call) -> None:
        self.then = _now()

    def is_current(self) -> bool:
        return self.then == _now()

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = _now()
        _set(self.then, now)
        try:
            yield
        finally:
            _set(now, self.then)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# Calls that read and set a flag.
FLAGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *[_attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
    *[_attribute(mkldnn, name) for name in ("enabled", "deterministic")],
]


def _now() -> list[Any]:
    return [read() for read, _ in FLAGS]


def _set(values: Sequence[Any], now: Sequence[Any]) -> None:
    for (_, set_flag), value, current in zip(FLAGS, values, now, strict=True):
        if value != current:
            set_flag(value)
