"""Checkpoints of every strategy go on under every other, as the stock strategy goes on from its own."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_revlib as revlib
from tests.distributed.checkpoints import OPTIMIZERS, kinds
from tests.distributed.pair import run
from tests.test_strategy import Net, data, trainer

CELLS = [
    (optimizer, first, then)
    for optimizer in OPTIMIZERS
    for first in kinds(optimizer)
    for then in kinds(optimizer)
    if (first, then) != ("fsdp, shards", "plain")
]


pytestmark = pytest.mark.xdist_group("checkpoints")  # one worker runs the processes, once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run("checkpoints.py", tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("cell", CELLS, ids=" > ".join)
def test_a_run_goes_on(found: Any, cell: tuple[str, str, str]) -> None:
    assert found[cell] <= 1e-6


def test_a_plain_module_loads_what_was_sharded(found: Any) -> None:
    assert found["loaded"] == "CoupledSequential"
    assert found["keys"] == [True, True]


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile_file(folder: Path, trap: Hostile) -> Path:
    torch.save({"state_dict": Net().state_dict(), "trap": trap}, folder / "one.ckpt")
    return folder / "one.ckpt"


def hostile_index(folder: Path, trap: Hostile) -> Path:
    shards = hostile_rest(folder, None)
    (shards / ".metadata").write_bytes(pickle.dumps(trap))
    return shards


def hostile_rest(folder: Path, trap: Hostile | None) -> Path:
    shards = folder / "shards.ckpt"
    dcp.save({"state_dict": Net().state_dict()}, checkpoint_id=shards, no_dist=True)
    torch.save({"trap": trap}, shards / "meta.pt")
    return shards


def hostile_entry(folder: Path, trap: Hostile) -> Path:
    """An entry that is no tensor lies in the shards in pickled form."""
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


@pytest.mark.parametrize("make", [hostile_file, hostile_index, hostile_rest, hostile_entry])
def test_a_hostile_checkpoint_executes_nothing(tmp_path: Path, make: Any) -> None:
    trap = Hostile(tmp_path / "executed")
    path = make(tmp_path, trap)
    for strategy in ("reversible", "reversible_fsdp"):
        if strategy == "reversible_fsdp" and make is hostile_entry:
            continue  # it reads no entry that it does not know
        with pytest.raises(BaseException, match=r"(?i)weights.only|executed"):
            trainer(tmp_path, strategy=strategy, devices=1).validate(Net(), data(), ckpt_path=path)
        assert not trap.path.exists()
    if path.is_dir():
        with pytest.raises(BaseException, match=r"(?i)weights.only|executed"):
            revlib.merge_checkpoint(path)
        assert not trap.path.exists()


def test_the_users_opposite_wish_for_torch_does_not_get_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opposite = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(opposite, "1")
    assert list(revlib.merge_checkpoint(hostile_rest(tmp_path, None))["state_dict"]) == list(Net().state_dict())
    assert os.environ[opposite] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
