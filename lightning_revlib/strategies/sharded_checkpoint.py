"""Checkpoints that are folders of shards, as FSDP2 writes them: read by any strategy, without executing anything.

torch reads a folder's index by plain `pickle`, and its smaller entries without `weights_only`: both could execute code.
This module prevents it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

INDEX = ".metadata"
FORCE, FORCE_NO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(name for name, one in vars(torch).items() if isinstance(one, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}  # fmt: skip


def is_sharded(path: Any) -> bool:
    """Return whether a checkpoint is a folder of shards."""
    return (Path(path) / INDEX).is_file()


@contextmanager
def plain_data_only(folder: Any) -> Iterator[None]:
    """Let nothing in `folder` be executed while it is read; raise UnpicklingError if its index holds more than data."""
    with (Path(folder) / INDEX).open("rb") as index:
        _RestrictedUnpickler(index).load()
    before = {name: os.environ.pop(name) for name in (FORCE, FORCE_NO) if name in os.environ}  # torch refuses both
    os.environ[FORCE] = "1"  # overrides weights_only=False in torch's own calls of torch.load
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update(before)


def merge_checkpoint(folder: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Return the checkpoint in a folder of shards as one dictionary, with whole tensors.

    >>> torch.save(merge_checkpoint("last.ckpt"), "whole.ckpt")
    >>> Net.load_from_checkpoint("whole.ckpt")

    Args:
        folder: as `ReversibleFSDPStrategy` writes it.
        weights_only: load plain data only, and execute no code from the checkpoint.

    Raises:
        ValueError: if `folder` is no folder of shards.
        UnpicklingError: for a checkpoint that holds more than plain data.
    """
    if not is_sharded(folder):
        raise ValueError(f"folder={str(folder)!r} is no folder of shards: it has no {INDEX}")
    with plain_data_only(folder) if weights_only else nullcontext():
        checkpoint = _load_distributed_checkpoint(Path(folder))
    states: list[Any] = []
    while (name := f"optimizer_{len(states)}") in checkpoint:
        states.append(_number_parameters(checkpoint.pop(name)))
    return {**checkpoint, "optimizer_states": states} if states else checkpoint


def _number_parameters(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters numbered, as in a file, instead of named, as in shards."""
    groups = state["param_groups"]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: one for name, one in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


class _RestrictedUnpickler(pickle.Unpickler):
    """Load an index, and refuse every name that is not in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.0 to 3.11.3 pickles a member of an enumeration so
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"the checkpoint's index names {module}.{name}, which is no part of a checkpoint: nothing of it was"
                " executed; pass weights_only=False if you trust its source"
            )
        return super().find_class(module, name)


def _member(enumeration: Any, name: Any) -> Any:
    """Return a member of an enumeration, as `getattr` would; raise UnpicklingError for anything else."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum) and name in enumeration.__members__):
        raise pickle.UnpicklingError(
            f"the checkpoint's index reads the attribute {name!r} of {enumeration!r}, which is no part of a checkpoint:"
            " nothing of it was executed; pass weights_only=False if you trust its source"
        )
    return enumeration[name]
