"""The optimizer in backward gives the same results, with the gradients of one block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer


def fit(tmp_path: Path, in_backward: bool, cls: type[Net] = Net, **options: Any) -> tuple[Net, Any]:
    L.seed_everything(5, verbose=False)
    net = cls()
    strategy = revlib.ReversibleStrategy(optimizer_in_backward=in_backward)
    run = trainer(tmp_path, strategy=strategy, **{"precision": "64-true", **options})
    run.fit(net, data(), data())
    return net, run


class Groups(Net):
    """Its optimizer has two groups, a frozen parameter, weight decay, momentum and a schedule."""

    def configure_optimizers(self) -> Any:
        self.stem.bias.requires_grad_(False)
        groups = [{"params": self.net.parameters()}, {"params": [*self.stem.parameters(), *self.head.parameters()]}]
        groups[1]["lr"] = 3e-3
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=1e-2, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Tied(Net):
    """One layer is in three blocks and outside of the stack: its gradient is complete only at the end of backward."""

    def build(self) -> None:
        tied = nn.Linear(8, 8)
        self.net = revlib.CoupledSequential(*[nn.Sequential(tied, nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tied(x))


@pytest.mark.parametrize("cls", [Net, Groups, Tied])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}], ids=str)
def test_the_same_results(tmp_path: Path, cls: type[Net], options: dict[str, Any]) -> None:
    (plain, run), (ours, other) = (fit(tmp_path, on, cls, **options) for on in (False, True))
    for (name, expected), (also, value) in zip(plain.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == also and torch.allclose(expected, value, rtol=1e-10, atol=1e-12), name
    states = [r.optimizers[0].state_dict()["state"] for r in (run, other)]
    assert sorted(states[0]) == sorted(states[1])  # by the parameters' numbers
    for mine, theirs in ((states[0][number], states[1][number]) for number in states[0]):
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k]), rtol=1e-8) for k in mine)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("cls", [Net, Groups])
def test_a_run_resumes_with_it_and_without(tmp_path: Path, cls: type[Net]) -> None:
    ends = []
    for first in (False, True):
        _, run = fit(tmp_path, first, cls, max_epochs=1)
        run.save_checkpoint(tmp_path / "last.ckpt")
        for then in (False, True):
            torch.manual_seed(6)
            strategy = revlib.ReversibleStrategy(optimizer_in_backward=then)
            net = cls()
            trainer(tmp_path, strategy=strategy, precision="64-true").fit(
                net, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
            )
            ends.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert all(torch.allclose(end, ends[0], rtol=1e-10, atol=1e-12) for end in ends)


class Deep(Net):
    def build(self) -> None:
        blocks = [nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(32)]
        self.net = revlib.CoupledSequential(*blocks)


def gradient_bytes(tmp_path: Path, in_backward: bool) -> tuple[int, int]:
    """Return the most bytes of gradients that parameters hold at a time, and the bytes of one block's parameters."""
    L.seed_everything(5, verbose=False)
    net, peak = Deep(), [0]

    def look(_: Tensor) -> None:
        peak[0] = max(peak[0], sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(look)  # runs before the optimizer's hook
    strategy = revlib.ReversibleStrategy(optimizer_in_backward=in_backward)
    trainer(tmp_path, strategy=strategy, max_steps=2).fit(net, data())
    return peak[0], sum(p.nbytes for p in net.net[0].parameters())


def test_gradients_of_one_block_at_most_are_held(tmp_path: Path) -> None:
    before, block = gradient_bytes(tmp_path, False)
    after, _ = gradient_bytes(tmp_path, True)
    assert before > 32 * block and after <= block


class Manual(Net):
    automatic_optimization = False


class Two(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Clips(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


class Counting(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


class Counts(Net):
    def configure_optimizers(self) -> Any:
        return Counting(self.parameters(), lr=0.1)


def test_hooks_that_run_too_late_are_warned_of(tmp_path: Path) -> None:
    class Late(Net):
        def on_after_backward(self) -> None: ...

    with pytest.warns(UserWarning, match=r"when Late\.on_after_backward runs, parameters have been stepped"):
        fit(tmp_path, True, Late)


def test_parameters_that_are_unfrozen_later_are_clipped_as_well(tmp_path: Path) -> None:
    class Unfreezes(Net):
        def configure_optimizers(self) -> Any:
            self.stem.requires_grad_(False)
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_train_epoch_start(self) -> None:
            self.stem.requires_grad_(True)

    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    nets = [fit(tmp_path, in_backward, Unfreezes, **options)[0] for in_backward in (True, False)]
    for p, q in zip(*[net.parameters() for net in nets], strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Net, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2, since it frees gradients"),
        (Net, {"callbacks": [L.pytorch.callbacks.GradientAccumulationScheduler({1: 2})]}, "GradientAccumulationSch"),
        (Net, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 by norm, which takes all gradients at once"),
        (Clips, {}, "Clips.configure_gradient_clipping"),
        (Manual, {}, "manual optimization"),
        (Two, {}, "LBFGS: it takes one optimizer"),
        (Counts, {}, "Counting counts in count for a whole group"),
        (
            Net,
            {
                "precision": None,
                "plugins": [L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
            },
            "GradScaler looks at all gradients before it steps; take 'bf16-mixed'",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_cannot_be_combined_is_refused(
    tmp_path: Path, cls: type[Net], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, True, cls, **options)
