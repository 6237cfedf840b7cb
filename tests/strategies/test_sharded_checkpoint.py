"""Reading a checkpoint executes nothing in it, be it a file or a folder of shards."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    """Leave the process group that a strategy of several processes sets up for one as well."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Hostile:
    """Make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile_file(folder: Path, trap: Hostile) -> Path:
    torch.save({"state_dict": Net().state_dict(), "trap": trap}, folder / "one.ckpt")
    return folder / "one.ckpt"


def hostile_index(folder: Path, trap: Hostile) -> Path:
    shards = hostile_remainder(folder, None)
    (shards / ".metadata").write_bytes(pickle.dumps(trap))
    return shards


def hostile_remainder(folder: Path, trap: Hostile | None) -> Path:
    shards = folder / "shards.ckpt"
    dcp.save({"state_dict": Net().state_dict()}, checkpoint_id=shards, no_dist=True)
    torch.save({"trap": trap}, shards / "meta.pt")
    return shards


def hostile_entry(folder: Path, trap: Hostile) -> Path:
    """Replace an entry that is no tensor: it lies in the shards in pickled form."""
    shards = folder / "shards.ckpt"
    dcp.save({"state_dict": Net().state_dict(), "entry": "text"}, checkpoint_id=shards, no_dist=True)
    torch.save({}, shards / "meta.pt")
    (file,) = shards.glob("*.distcp")
    content, bad = file.read_bytes(), io.BytesIO()
    torch.save(trap, bad)
    file.write_bytes(content + bad.getvalue())
    with (shards / ".metadata").open("rb") as index:
        metadata = pickle.load(index)
    for key, info in metadata.storage_data.items():
        if key.fqn == "entry":
            info.offset, info.length = len(content), len(bad.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    return shards


@pytest.mark.parametrize("make", [hostile_file, hostile_index, hostile_remainder, hostile_entry])
def test_a_hostile_checkpoint_executes_nothing(tmp_path: Path, make: Any) -> None:
    trap = Hostile(tmp_path / "executed")
    path = make(tmp_path, trap)
    for strategy in ("reversible", "reversible_fsdp"):
        if strategy == "reversible_fsdp" and make is hostile_entry:
            continue  # FSDP2 reads no entry that it does not know
        with pytest.raises(BaseException, match=r"(?i)weights.only|executed"):
            trainer(tmp_path, strategy=strategy, devices=1).validate(Net(), data(), ckpt_path=path)
        assert not trap.path.exists()
    if path.is_dir():
        with pytest.raises(BaseException, match=r"(?i)weights.only|executed"):
            revlib.merge_checkpoint(path)
        assert not trap.path.exists()


def test_the_users_setting_of_torch_is_overridden_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opposite = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(opposite, "1")
    assert list(revlib.merge_checkpoint(hostile_remainder(tmp_path, None))["state_dict"]) == list(Net().state_dict())
    assert os.environ[opposite] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Reads:
    """Read an attribute when it is unpickled, as some releases of Python do for a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_an_index_may_read_members_of_enumerations_only(tmp_path: Path) -> None:
    shards = hostile_remainder(tmp_path, None)
    with (shards / ".metadata").open("rb") as index:
        metadata = pickle.load(index)
    encoding = next(type(x) for x in dcp.metadata.TensorProperties().__getstate__() if isinstance(x, Enum))
    metadata.planner_data = {**(metadata.planner_data or {}), "more": Reads(encoding, "TORCH_CONTIGUOUS_FORMAT")}
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    assert list(revlib.merge_checkpoint(shards)["state_dict"]) == list(Net().state_dict())
    metadata.planner_data["more"] = Reads(Path, "unlink")
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="index reads the attribute 'unlink' of"):
        revlib.merge_checkpoint(shards)
