"""FSDP2's policies, accumulation, clipping, exact resumption and Fabric, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, distance, fabric_fit, trainer, whole


class Invertible(Net):
    """Its stack has a parametrised invertible step, and it calls the stack's inverse."""

    def build(self) -> None:
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
        self.net = revlib.CoupledSequential(blocks[0], revlib.Orthogonal(8), *blocks[1:])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        z = self.net(self.stem(batch[0]))
        return self.net.inverse(z) - self.stem(batch[0])


class Layers(Net):
    """Its own forward calls the layers of a list."""

    reversible_targets = {"layers": {"coupling": "momentum", "residual": True, "split_dim": None}}  # noqa: RUF012

    def build(self) -> None:
        self.layers = nn.ModuleList([Residual() for _ in range(3)])
        self.net = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh()


class Own(Net):
    """Shards itself, the stack as a whole included."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        revlib.swap(self)
        fully_shard(self.net, mesh=mesh)
        fully_shard(self.head, mesh=mesh)
        fully_shard(self.stem, mesh=mesh)


class TooEarly(Own):
    def __init__(self) -> None:
        super().__init__("later")

    def configure_model(self) -> None:
        self.build()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit(out: Path, strategy: Any, cls: Any = Net, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train from seed 5 for five steps; return the module and its whole parameters."""
    L.seed_everything(5, verbose=False)
    net = cls()
    run = trainer(out, strategy=strategy, devices=2, **{"max_steps": 5, **options})
    run.fit(net, data(), data())
    return net, whole(net.named_parameters())


def resumed(out: Path) -> dict[str, bool]:
    """Return whether runs from checkpoints within and between epochs end with the same bits; batches are shuffled."""
    equal = {}
    for strategy in ("reversible", "reversible_fsdp"):

        def run(folder: str | None = None, start: Path | None = None, strategy: str = strategy) -> Any:
            L.seed_everything(5, verbose=False)
            net, callbacks = Net(), [revlib.ExactResume()]
            if folder:
                callbacks.append(ModelCheckpoint(out / folder, "{step}", every_n_train_steps=2, save_top_k=-1))
            options = {"devices": 2, "max_epochs": 3, "callbacks": callbacks, "enable_checkpointing": bool(folder)}
            loader = DataLoader(data().dataset, batch_size=8, shuffle=True)
            trainer(out, strategy=strategy, **options).fit(net, loader, data(), ckpt_path=start)
            return whole(net.named_parameters())

        expected = run(strategy)
        for path in sorted((out / strategy).glob("*.ckpt")):
            equal[f"resumed {strategy} {path.stem}"] = distance(run(start=path), expected) == 0
    return equal


def budgets() -> dict[str, Any]:
    """Shard a stack with a budget and a head by hand: ten first forwards, which measure, and steps after the last."""
    mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def build(cls: Any, **options: Any) -> Any:
        torch.manual_seed(3)
        blocks = [nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(4)]
        return nn.Sequential(cls(*blocks, **options), nn.Linear(16, 1)).double()

    whole, plain = build(revlib.ReversibleSequential, memory_budget=0.7), build(revlib.CoupledSequential)
    whole(x[rank])
    plans, as_before = [whole[0].plan], []
    for _ in range(10):
        net = build(revlib.ReversibleSequential, memory_budget=0.7)
        for part in (*net[0], net):
            fully_shard(part, mesh=mesh)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (net, plain)]
        loss = net(x[rank]).square().mean()
        plans.append(net[0].plan)
        # the order in which backward will gather parameters; FSDP2 has no public name for it
        order = [group.modules for group in net._get_fsdp_state()._comm_ctx.post_forward_order]
        as_before.append(order == [(part,) for part in (*net[0], net)])
        as_before.append(all(isinstance(p, DTensor) for p in net[0].parameters()))
    everyones: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyones, plans)

    apart = []
    for _ in range(4):
        loss.backward()
        plain(x.flatten(0, 1)).square().mean().backward()
        pairs = zip(net.parameters(), plain.parameters(), strict=True)
        apart += [((p.grad.full_tensor() - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss = net(x[rank]).square().mean()
    return {
        "plans of a budget": all(plan == plans[0] for each in everyones for plan in each),
        "a mixture": len(set(plans[0].treatments["stack"])) > 1,
        "sharded as before after measuring": all(as_before),
        "gradients under a budget": max(apart),
    }


def main(out: Path) -> None:
    """Save all findings by name."""
    found: dict[str, Any] = {}
    _, reference = fit(out, "reversible")

    net, _ = fit(out, "reversible_fsdp")
    found["blocks are sharded each"] = all(isinstance(block, FSDPModule) for block in net.net)
    found["root is sharded"] = isinstance(net, FSDPModule) and not isinstance(net.net, FSDPModule)
    found["keys"] = list(net.state_dict()) == list(Net().state_dict())
    run = trainer(out, strategy="reversible_fsdp", devices=2)
    run.validate(net, data(), verbose=False)
    run.fit(net, data())
    found["fits again"] = len(net.losses) >= 8

    for name, options in {
        "accumulation": {"accumulate_grad_batches": 2, "max_steps": 3},
        "clipping by norm": {"gradient_clip_val": 0.5},
        "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    }.items():
        found[name] = distance(fit(out, "reversible_fsdp", **options)[1], fit(out, "reversible", **options)[1])
    in_backward = revlib.ReversibleFSDPStrategy(optimizer_in_backward=True)
    found["optimizer in backward"] = distance(fit(out, in_backward)[1], reference)
    found["own sharding"] = distance(fit(out, "reversible_fsdp", Own)[1], reference)
    found["layers"] = distance(fit(out, "reversible_fsdp", Layers)[1], fit(out, "reversible", Layers)[1])
    mixed = revlib.ReversibleFSDPStrategy(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    plain = fit(out, "reversible", Layers, precision="bf16-mixed")[1]
    found["mixed precision policy"] = distance(fit(out, mixed, Layers)[1], plain)
    kept = revlib.ReversibleFSDPStrategy(reshard_after_forward=False)
    found["kept after forward"] = distance(fit(out, kept)[1], reference)
    offload = revlib.ReversibleFSDPStrategy(offload_policy=CPUOffloadPolicy(pin_memory=False))
    found["offload policy"] = distance(fit(out, offload)[1], reference)
    found["budget"] = distance(fit(out, revlib.ReversibleFSDPStrategy(memory_budget=0.7))[1], reference)
    found.update(budgets())

    net, _ = fit(out, "reversible_fsdp", Invertible)
    errors = trainer(out, strategy="reversible_fsdp", devices=2).predict(net, data())
    found["inverse"] = max(error.abs().max().item() for error in errors)
    try:
        fit(out, "reversible_fsdp", TooEarly)
    except ValueError as error:
        found["too early"] = str(error)
    try:
        fit(out, revlib.ReversibleStrategy(optimizer_in_backward=True))
    except ValueError as error:
        found["in backward under ddp"] = str(error)
    found.update(resumed(out))
    losses = {}
    finding = revlib.ReversibleFabricStrategy(find_unused_parameters=True)
    for name, strategy in {"ddp": "ddp", "reversible": finding, "reversible_fsdp": "reversible_fsdp"}.items():
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
        losses[name], _, model = fabric_fit(fabric, is_sharded=name == "reversible_fsdp")
        if name == "reversible":
            found["fabric passes arguments on to DDP"] = model._forward_module.find_unused_parameters
    for name in ("reversible", "reversible_fsdp"):
        found[f"fabric, {name}"] = (torch.tensor(losses[name]) - torch.tensor(losses["ddp"])).abs().max().item()
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / "result.pt")
