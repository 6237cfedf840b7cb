"""What strategies and `ReversibleCallback` share: targets, memory budgets, advice on exhausted memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, fit, trainer


def test_targets_of_the_strategy_win_over_those_of_the_module(tmp_path: Path) -> None:
    class Named(Net):
        reversible_targets = {"net": {"coupling": "midpoint"}}  # noqa: RUF012

    class Called(Net):
        def reversible_targets(self) -> Any:
            return {"net": {"coupling": "leapfrog"}}

    for cls, targets, coupling in (
        (Named, None, revlib.Midpoint()),
        (Called, None, revlib.Leapfrog()),
        (Named, {"n?t": {"coupling": {"name": "momentum", "gamma": 0.9}}}, revlib.Momentum()),
    ):
        net = cls()
        trainer(tmp_path, strategy=revlib.ReversibleStrategy(targets=targets), max_epochs=1).fit(net, data())
        assert net.net.couplings == (coupling,)


def test_nothing_to_swap_and_wrong_targets_are_errors(tmp_path: Path) -> None:
    class Plain(Net):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(16, 16))  # type: ignore[assignment]

    for targets, message in ((None, "nothing to swap: Plain has no"), ({"nett": {}}, "target 'nett' matches no")):
        for options in (
            {"strategy": revlib.ReversibleStrategy(targets=targets)},
            {"callbacks": [revlib.ReversibleCallback(targets=targets)]},
        ):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, **options).fit(Plain(), data())


class Late(Net):
    """Assigns another stack in a hook."""

    hook = ""

    def assign(self) -> None:
        if self.current_epoch == 0:
            self.net = self.late = revlib.CoupledSequential(*[nn.Linear(8, 8) for _ in range(3)])

    def on_fit_start(self) -> None:
        if self.hook == "on_fit_start":
            self.assign()

    def on_train_start(self) -> None:
        if self.hook == "on_train_start":
            self.assign()

    def on_train_epoch_start(self) -> None:
        if self.hook == "on_train_epoch_start":
            self.assign()


@pytest.mark.parametrize("by", ["strategy", "callback"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_stack_that_a_hook_assigns(tmp_path: Path, hook: str, by: str) -> None:
    net, targets = Late(), {"net": {"coupling": "midpoint"}}
    net.hook = hook
    options: dict[str, Any] = {"strategy": revlib.ReversibleStrategy(targets)}
    if by == "callback":
        options = {"callbacks": [revlib.ReversibleCallback(targets)]}
    trainer(tmp_path, **options).fit(net, data(), data())
    assert net.net is net.late and net.net.couplings == (revlib.Midpoint(),) and net.net.drift is not None


@pytest.mark.parametrize("cls", [revlib.ReversibleStrategy, revlib.ReversibleDDPStrategy])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer_in_backward": "no"}, "optimizer_in_backward='no': pass True or False"),
        ({"restore": 1}, "restore=1: pass True or False"),
        ({"find_unused_paramters": True}, "has no argument find_unused_paramters=True; did you mean find_unused_param"),
        ({"targets": ["net"]}, r"targets=\['net'\]: pass a mapping from the path"),
    ],
)
def test_wrong_arguments_are_named(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cls(**arguments)


def budgeted(by: str) -> dict[str, Any]:
    """Return options that give a budget to all stacks, by the strategy or the callback, or to one stack."""
    if by == "callback":
        return {"strategy": "auto", "callbacks": [revlib.ReversibleCallback(memory_budget=0.8)]}
    options = {"memory_budget": 0.8} if by == "strategy" else {"targets": {"net": {"memory_budget": 0.8}}}
    return {"strategy": revlib.ReversibleStrategy(**options)}


@pytest.fixture(scope="module")
def unbudgeted(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return fit(tmp_path_factory.mktemp("plain"), "reversible", precision="64-true")


def count_calls(net: Net) -> Counter[int]:
    """Return how often each training step calls the layers of the stack; they are counted from now on."""
    calls: Counter[int] = Counter()
    for block in net.net:
        block[1].register_forward_hook(lambda *_: calls.update([net.global_step] if net.training else []))
    return calls


@pytest.mark.parametrize("by", ["strategy", "callback", "stack"])
def test_a_memory_budget_changes_bytes_only(tmp_path: Path, unbudgeted: Net, by: str) -> None:
    L.seed_everything(5, verbose=False)
    net, run = Net(), trainer(tmp_path, precision="64-true", **budgeted(by))
    calls = count_calls(net)
    run.fit(net, data(), data())
    for expected, loss in zip(unbudgeted.losses, net.losses, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    plan = net.net.plan
    assert plan.peak <= plan.limit < plan.plain and set(plan.treatments["net"]) != {"reversible"}
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert by == "stack" or checkpoint["memory_plan"]["treatments"] == {"net": plan.treatments["net"]}
    assert calls[0] > calls[1]  # the first step measures

    again = Net()
    calls = count_calls(again)
    trainer(tmp_path, precision="64-true", max_epochs=3, **budgeted(by)).fit(again, data(), data(), ckpt_path=path)
    assert again.net.plan == plan and calls[12] == calls[13] == calls[17] > 0  # a run that resumes does not


def test_a_budget_too_small_and_a_wrong_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_budget='2 pounds'"):
        revlib.ReversibleStrategy(memory_budget="2 pounds")
    with pytest.raises(ValueError, match="memory_budget=64 is 64 B, and the reversible stacks need at least"):
        trainer(tmp_path, max_epochs=1, strategy=revlib.ReversibleStrategy(memory_budget=64)).fit(Net(), data())


def test_a_later_run_has_its_own_budget(tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(ValueError, match="memory_budget=64"):
        trainer(tmp_path, max_epochs=1, strategy=revlib.ReversibleStrategy(memory_budget=64)).fit(net, data())
    both: dict[str, Any] = {"strategy": revlib.ReversibleStrategy(memory_budget=0.9)}
    trainer(tmp_path, max_epochs=1, **both, callbacks=[revlib.ReversibleCallback()]).fit(net, data())
    assert net.net.plan.limit == int(0.9 * net.net.plan.plain)
    trainer(tmp_path, max_epochs=1, strategy="reversible").fit(net, data())
    assert net.net.plan is None


def test_figures_of_stacks_that_a_budget_no_longer_plans_are_passed_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, **budgeted("strategy"))
    run.fit(Net(), data(), data())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    strategy = revlib.ReversibleStrategy({"net": {"store_last": 1}}, memory_budget=0.8)
    again = Net()
    run = trainer(tmp_path, max_epochs=2, strategy=strategy)
    run.fit(again, data(), data(), ckpt_path=path)
    run.save_checkpoint(path)
    assert again.net.plan is None and not {"memory_plan", "memory_figures"} & {*torch.load(path, weights_only=True)}


class Exhausts(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("by", ["strategy", "callback"])
@pytest.mark.parametrize("store", [0, 2])
def test_out_of_memory_names_the_way_out(tmp_path: Path, by: str, store: int) -> None:
    targets = {"net": {"store_last": store}}
    options: dict[str, Any] = {"strategy": revlib.ReversibleStrategy(targets)}
    if by == "callback":
        options = {"callbacks": [revlib.ReversibleCallback(targets)]}
    message = (
        "net: 2 of 5 blocks keep activations: give them a smaller memory_budget or store_last"
        if store
        else "hold their output"
    )
    with pytest.raises(torch.OutOfMemoryError, match=f"(?s)CUDA out of memory.*{message}.*revlib.report"):
        trainer(tmp_path, **options).fit(Exhausts(), data())


class Huge(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.empty(1 << 60).sum()


def test_out_of_memory_on_the_host_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)allocate.*reversible stacks: all stacks hold their output only"):
        trainer(tmp_path, strategy="reversible").fit(Huge(), data())


class ExhaustsLater(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(batch, batch_idx)


def test_out_of_memory_counts_what_a_plan_stores(tmp_path: Path) -> None:
    strategy = revlib.ReversibleStrategy(memory_budget=1.0)
    message = "net: 5 of 5 steps keep activations: by their memory plan; take a smaller memory_budget"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        trainer(tmp_path, strategy=strategy).fit(ExhaustsLater(), data())
