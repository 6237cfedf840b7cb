"""Reformer: gradients, causality, generated text and errors."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_revlib.nn import COUPLINGS, MemoryMeter, ReversibleSequential, swap
from lightning_revlib.recipes.data.sequences import Duplication
from lightning_revlib.recipes.models.attention import LocalAttention, LSHAttention
from lightning_revlib.recipes.models.reformer import AxialPositions, Reformer, ReformerModule

SMALL = {
    "vocab": 11,
    "length": 96,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "attention": ["local", "lsh"],
    "lsh": {"chunk": 16, "hashes": 2},
    "local": {"chunk": 16},
}
CALM = [name for name, cls in COUPLINGS.items() if not cls.needs_grid]


def coupled(name):
    return {"name": name, "dim": 2} if name == "affine" else name


def gradients(net, tokens):
    torch.manual_seed(1)
    loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("coupling", CALM)
@pytest.mark.parametrize("split_dim", [None, 2])
@pytest.mark.parametrize("more", [{"shift": True}, {"ff_chunks": 3}])
def test_gradients_are_those_of_autograd(split_dim, coupling, more):
    options = {"split_dim": split_dim, "coupling": coupled(coupling), "dropout": 0.1, "attention_dropout": 0.1}
    net, tokens = Reformer(**SMALL, **options, **more).double(), torch.randint(11, (2, 96))
    expected = gradients(net, tokens)
    assert swap(net) == ["stack"]
    assert isinstance(net.stack, ReversibleSequential)
    for one, other in zip(gradients(net, tokens), expected, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm().clamp_min(1)


def test_on_the_grid_hashes_are_in_backward_as_in_forward():
    net, tokens = Reformer(**SMALL, grid_bits=12), torch.randint(11, (2, 96))
    expected = gradients(net, tokens)
    swap(net)
    assert all(map(torch.equal, gradients(net, tokens), expected))


@pytest.mark.parametrize("shift", [False, True])
def test_a_token_is_predicted_from_earlier_tokens_only(shift):
    net = Reformer(**SMALL, shift=shift)
    embedded = net.embedding(torch.randint(11, (2, 96))).detach().requires_grad_()
    net.embedding.forward = lambda tokens: embedded[:, : tokens.shape[1]]
    logits = net(torch.zeros(2, 96, dtype=torch.long))
    for t in (0, 1, 40, 95):
        (gradient,) = torch.autograd.grad(logits[:, t].sum(), embedded, retain_graph=True)
        assert not gradient[:, t:].any() and (t == 0 or gradient[:, t - 1].any())


def test_padding_does_not_change_later_tokens():
    net, tokens, mask = Reformer(**SMALL).eval(), torch.randint(11, (2, 96)), torch.ones(2, 96, dtype=torch.bool)
    mask[:, :30] = False
    outputs = []
    for padding in (0, 5):
        torch.manual_seed(1)
        outputs.append(net(torch.where(mask, tokens, padding), mask)[:, 31:])
    assert torch.equal(*outputs)


def test_chunks_of_the_feed_forward_change_memory_only():
    one, other = (Reformer(**SMALL, ff=512, ff_chunks=chunks).double() for chunks in (1, 6))
    other.load_state_dict(one.state_dict())
    tokens, peaks = torch.randint(11, (2, 96)), []
    for a, b in zip(gradients(one, tokens), gradients(other, tokens), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm().clamp_min(1)
    for net in (one, other):
        swap(net)
        with MemoryMeter() as meter:
            gradients(net, tokens)
        peaks.append(meter.peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_memory_does_not_grow_with_depth():
    held = []
    for depth in (2, 6):
        net, tokens = Reformer(**{**SMALL, "depth": depth}), torch.randint(11, (2, 96))
        swap(net)
        with MemoryMeter() as meter:
            logits = net(tokens)
        held.append(meter.live)
        assert logits.shape == (2, 96, 11)
    assert held[0] == held[1]


@pytest.mark.parametrize("chunks", [1, 3])
def test_flops_are_four_thirds(chunks):
    net, tokens, flops = Reformer(**{**SMALL, "vocab": 2}, ff_chunks=chunks), torch.randint(2, (2, 96)), []
    for reversible in (False, True):
        if reversible:
            swap(net)
        with FlopCounterMode(display=False) as counter:
            net(tokens).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(4 / 3, abs=0.01)  # the head is not run again


def test_layers_take_the_kinds_in_turn_and_hashes_can_be_changed():
    net = Reformer(**{**SMALL, "depth": 5})
    kinds = [type(m.attention) for m in net.stack if hasattr(m, "attention")]
    assert kinds == [LocalAttention, LSHAttention, LocalAttention, LSHAttention, LocalAttention]
    lsh, tokens = net.stack[2].attention, torch.randint(11, (1, 96))
    with net.hashing(8):
        assert (lsh.hashes, lsh.full_below) == (8, 0)
    with net.hashing(0):
        assert torch.equal(net(tokens), net(tokens))  # full attention draws no rotations
    assert (lsh.hashes, lsh.full_below) == (2, 32)


def test_weights_are_tied():
    net = Reformer(**SMALL)
    assert net.head.weight is net.embedding.weight
    assert sum(p.numel() for p in Reformer(**SMALL, tied=False).parameters()) == 11 * 16 + sum(
        p.numel() for p in net.parameters()
    )


def test_axial_positions():
    positions = AxialPositions([4, 5], [3, 2])
    rows, columns = positions.axes
    for n in (1, 7, 20):
        at = torch.arange(n)
        assert torch.equal(positions(n), torch.cat((rows[at // 5], columns[at % 5]), 1))
    assert [list(w.shape) for w in Reformer(length=65536, dim=64, depth=1).positions.axes] == [[256, 32], [256, 32]]
    with torch.device("meta"):
        assert Reformer(length=12288, dim=64, depth=1, axial=[64, 64, 3]).positions(12288).shape == (12288, 64)


def test_the_published_network_on_enwik8_has_its_size():
    with torch.device("meta"):
        net = Reformer(
            length=65536, dim=768, depth=12, heads=8, head_dim=64, ff=2048, axial=[128, 512], axial_dims=[256, 512],
            attention=["local", "local", "lsh", "local"],
        )  # fmt: skip
    attention = 12 * 512 * 768 * 2 + 12 * 768 + 512 * 768 * (9 * 2 + 3)  # values and outputs; queries, keys
    assert sum(p.numel() for n, p in net.named_parameters() if "attention" in n) == attention


def test_it_learns_and_generates_a_sequence():
    net = Reformer(vocab=5, length=24, dim=32, depth=1, heads=2)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    tokens = (torch.arange(24) + torch.arange(5)[:, None]) % 5
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    start = torch.tensor([[3, 4], [1, 2]])
    written = net.generate(start, 30, temperature=0)  # longer than what it sees at a time
    assert written.shape == (2, 32) and net.training
    assert torch.equal(written[:, :20], (torch.arange(20) + start[:, :1]) % 5)
    assert torch.equal(net.generate(start, 10, temperature=3.0, top_k=1), net.generate(start, 10, temperature=0))
    torch.manual_seed(1)
    drawn = net.generate(start, 20, temperature=100.0)
    torch.manual_seed(1)
    assert torch.equal(drawn, net.generate(start, 20, temperature=100.0)) and drawn.unique().numel() == 5
    assert net.generate(start[:, :0], 3).shape == (2, 3)  # from nothing


def test_both_strategies_train_alike(tmp_path):
    losses = []
    for strategy in ("auto", "reversible"):
        L.seed_everything(1, verbose=False)
        module = ReformerModule(**{**SMALL, "length": 64, "lsh": {"chunk": 8}}, optimizer=torch.optim.AdamW)
        trainer = L.Trainer(
            strategy=strategy, precision="64-true", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
        )  # fmt: skip
        data = Duplication(length=64, vocab=11, epoch=4, batch_size=2, held_out=2)
        trainer.fit(module, data)
        metrics = {**trainer.callback_metrics, **trainer.test(module, data, verbose=False)[0]}
        losses.append([float(metrics[k]) for k in ("train/loss", "val/loss", "val/bpb", "test/acc")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_hyperparameters_are_plain_and_hold_no_optimizer():
    module = ReformerModule(**SMALL, optimizer=torch.optim.SGD)
    assert dict(module.hparams) == {**SMALL, "test_hashes": ()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": [1, 2]}, r"depth=\[1, 2\]: a Reformer has no stages"),
        ({"depth": 0}, "depth=0"),
        ({"split_dim": 0}, "split_dim=0: the streams would be different texts"),
        ({"split_dim": 1}, "split_dim=1: the streams would be the halves of a text, and the first would see"),
        ({"split_dim": -2}, "split_dim=-2: the streams would be the halves of a text"),
        ({"split_dim": 3}, "split_dim=3: tokens have the dimensions 0 to 2"),
        ({"split_dim": 2, "dim": 15, "heads": 1}, "split_dim=2: a width of dim=15 cannot be halved"),
        ({"coupling": "affine"}, "along another dimension than 2, the width; set its dim to 2"),
        ({"coupling": "momentun"}, "did you mean 'momentum'"),
        ({"heads": 3}, "heads=3: a width of 16"),
        ({"attention": "lsh"}, "attention='lsh': pass a list of lsh, local, full"),
        ({"attention": ["lhs"]}, r"attention=\['lhs'\]"),
        ({"activation": "tanh"}, "activation='tanh' is none of relu, gelu"),
        ({"axial": [9, 10]}, r"axial=\[9, 10\] has 90 positions, and length=96"),
        ({"axial": [8, 12], "axial_dims": [8, 9]}, r"axial_dims=\[8, 9\]: .* sum up to dim=16"),
        ({"ff_chunks": 0}, "ff_chunks=0"),
        ({"ff_chunks": "abc"}, "ff_chunks='abc': pass a whole number"),
        ({"attention_dropout": 2}, "attention_dropout=2: pass a probability"),
        ({"ff_chunks": 2, "shift": True}, "ff_chunks=2 with shift=True"),
    ],
)  # fmt: skip
def test_errors_of_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Reformer(**{**SMALL, **options})


def test_errors_of_wrong_input():
    net = Reformer(**SMALL)
    with pytest.raises(ValueError, match=r"tokens of shape \[2, 97\]: .* from 1 to 96"):
        net(torch.zeros(2, 97, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=-1"):
        net.generate(torch.zeros(1, 1, dtype=torch.long), 1, temperature=-1)
    with pytest.raises(ValueError, match=r"shape.*works on tokens; take data=topics"):
        ReformerModule(shape=(1, 8, 8), classes=10)
