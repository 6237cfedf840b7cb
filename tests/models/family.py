"""What every family of models has to show, in the order of a user's doings. `Family` says how to build and call one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

COUPLINGS: dict[str, Any] = {
    "momentum": {"coupling": {"name": "momentum", "gamma": 0.9}},
    "midpoint": {"coupling": "midpoint"},
    "leapfrog": {"coupling": {"name": "leapfrog", "h": 0.5}},
    "scaled": {"coupling": {"name": "scaled", "scale": 0.8}},
    "bdia": {"coupling": "bdia", "grid_bits": 20},
}


@dataclass(frozen=True)
class Family:
    build: Callable[[int], nn.Module]  # depth -> model
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    path: str
    options: dict[str, Any]

    def model(self, depth: int) -> nn.Module:
        torch.manual_seed(0)
        return self.build(depth).train()

    def targets(self, **options: Any) -> dict[str, Any]:
        return {self.path: {**self.options, **options}}

    def gradients(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = self.loss(model, batch)
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def check_gradients(family: Family, coupling: str) -> None:
    """Loss and gradients are finite and those of ordinary autograd of the same function; keys and objects stay."""
    model, batch = family.model(3).double(), to_double(family.batch())
    keys, parameters = list(model.state_dict()), list(model.parameters())
    before = family.gradients(model, batch)
    revlib.swap(model, family.targets(**COUPLINGS[coupling]))
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    stack = model.get_submodule(family.path)
    count = len(stack)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    revlib.swap(twin, {family.path: {"store_last": count}})
    after, expected = family.gradients(model, batch), family.gradients(twin, batch)
    assert after.keys() == expected.keys() == before.keys()
    for name, value in after.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
    assert stack.drift is not None and twin.get_submodule(family.path).drift is None
    revlib.restore(model)
    again = family.gradients(model, batch)
    assert list(model.state_dict()) == keys and all(torch.equal(again[name], before[name]) for name in before)


def check_memory(family: Family) -> list[tuple[int, int, int]]:
    """Activation bytes held before and after at depths 2, 4 and 8: after, they are flat."""
    rows = []
    for depth in (2, 4, 8):
        model, batch = family.model(depth), family.batch()
        plain = held(family, model, batch)
        revlib.swap(model, family.targets(coupling="midpoint"))
        rows.append((depth, plain, held(family, model, batch)))
    plain, after = [row[1] for row in rows], [row[2] for row in rows]
    assert plain[2] - plain[1] > 1.8 * (plain[1] - plain[0]) > 0
    assert max(after) - min(after) <= 0.01 * min(after), rows
    return rows


def held(family: Family, model: nn.Module, batch: Any) -> int:
    with revlib.MemoryMeter() as meter:
        loss = family.loss(model, batch)
        live = meter.live
        del loss
    return live


def check_training(family: Family, tmp_path: Any) -> nn.Module:
    """Ten steps of the Trainer with the strategy lower the loss on one batch as they do for the twin; keys stay."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = family.model(3)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = family.loss(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 3e-3)

    module = Module()
    keys = list(module.state_dict())
    options = family.targets(coupling={"name": "momentum", "gamma": 0.5})[family.path]
    trainer = L.Trainer(
        strategy=revlib.ReversibleStrategy(targets={f"model.{family.path}": options}), max_steps=10, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Same(family.batch()), batch_size=None))
    assert len(module.losses) == 10 and module.losses[-1] < 0.95 * module.losses[0]
    assert list(module.state_dict()) == keys
    return module.model


class Same(torch.utils.data.Dataset):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return self.batch


def to_double(batch: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch
    )
