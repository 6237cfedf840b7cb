"""Momentum ResNet: the papers' sizes and equations, conversion of a residual network, and errors."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_revlib.nn import COUPLINGS, ReversibleSequential, swap
from lightning_revlib.recipes.models.momentumnet import MomentumNet, MomentumNetModule, Residual, Stage, convert
from tests.recipes.models.resnet import ResNet

SMALL = {"shape": (1, 8, 8), "depth": 3, "width": 8, "strides": (1, 2)}


@pytest.mark.parametrize(("depth", "imagenet"), [(18, False), (34, True), (50, True), (101, False), (152, True)])
def test_as_many_parameters_as_the_residual_network(depth, imagenet):
    with torch.device("meta"):
        resnet = ResNet(depth, classes=100, imagenet=imagenet)
        net = MomentumNet(
            (3, 224, 224) if imagenet else (3, 32, 32), 100, depth=depth, stem="imagenet" if imagenet else "cifar"
        )
        x = torch.empty(1, *net.shape)
        sizes = []
        for stage in net.stages:
            stage.register_forward_hook(lambda module, args, out: sizes.append(out.shape))
        assert net(x).shape == resnet(x).shape == (1, 100)
    assert sorted(p.shape for p in net.parameters()) == sorted(p.shape for p in resnet.parameters())
    assert [s[2] for s in sizes] == ([56, 28, 14, 7] if imagenet else [32, 16, 8, 4])


def test_the_first_block_is_ordinary_and_the_others_have_neither_skip_nor_last_relu():
    stage = MomentumNet(**SMALL).stages[1]
    assert isinstance(stage.first, Residual) and isinstance(stage.first.skip, nn.Sequential)
    assert [type(m) for m in stage.stack[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]


@pytest.mark.parametrize("velocity", [None, "learned"])
def test_the_papers_equation(velocity):
    net = MomentumNet(**SMALL, velocity=velocity, coupling={"name": "momentum", "gamma": 0.7}).double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    y = net.stem(x)
    for stage in net.stages:
        y = stage.first(y)
        v = torch.zeros_like(y) if velocity is None else stage.velocity(y)
        for f in stage.stack:
            v = 0.7 * v + (1 - 0.7) * f(y)
            y = y + v
    assert torch.allclose(net(x), net.head(y), rtol=1e-12)


def test_convolutions_start_as_he_et_al_have_it():
    net = MomentumNet()
    conv = net.stages[3].stack[0][0]
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("velocity", [None, "learned"])
def test_the_same_gradients_when_swapped(velocity):
    net = MomentumNet(**SMALL, velocity=velocity).double()
    _compare(net, torch.rand(4, 1, 8, 8, dtype=torch.float64), ["stages.0.stack", "stages.1.stack"])


@pytest.mark.parametrize("split_dim", [None, 1, 2, -1])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_coupling_and_split(coupling, split_dim):
    grid = 12 if COUPLINGS[coupling].needs_grid else None
    net = MomentumNet(**SMALL, coupling=coupling, split_dim=split_dim, grid_bits=grid)
    swap(net)
    loss = net(torch.rand(2, 1, 8, 8)).square().sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in net.parameters())


def test_one_block_a_stage_leaves_nothing_to_reverse():
    net = MomentumNet(**{**SMALL, "depth": [1, 3]})
    assert swap(net) == ["stages.1.stack"]
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_conversion_keeps_parameters_and_follows_the_equation():
    resnet = ResNet(34, width=4).double().eval()
    _train_norms(resnet)
    before, x = list(resnet.parameters()), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    original = copy.deepcopy(resnet)
    net = convert(resnet, coupling={"name": "momentum", "gamma": 0.6})
    assert net is resnet and [id(p) for p in net.parameters()] == [id(p) for p in before]
    y = F.relu(original.bn1(original.conv1(x)))
    for i in range(1, 5):
        first, *others = getattr(original, f"layer{i}")
        y = first(y)
        v = torch.zeros_like(y)
        for block in others:
            v = 0.6 * v + (1 - 0.6) * (block(y) - y)
            y = y + v
    assert torch.allclose(net(x), original.fc(y.mean((2, 3))), rtol=1e-10)


def test_conversion_nears_the_residual_network_as_gamma_vanishes():
    resnet = ResNet(18, width=4).double().eval()
    _train_norms(resnet)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = resnet(x)
    got = convert(resnet, coupling={"name": "momentum", "gamma": 1e-9})(x)
    assert torch.allclose(got, expected, rtol=1e-7)


def test_a_converted_network_trains_reversibly():
    net = convert(ResNet(34, width=4).double())
    _compare(net, torch.rand(4, 3, 16, 16, dtype=torch.float64), [f"layer{i}.stack" for i in range(1, 5)])


def test_conversion_errors():
    with pytest.raises(ValueError, match="ResNet has no layer5; name its stages"):
        convert(ResNet(18, width=4), stages=["layer1", "layer5"])
    with pytest.raises(TypeError, match="stage conv1 of ResNet is a Conv2d"):
        convert(ResNet(18, width=4), stages=["conv1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, r"depth=20: the networks of the paper are 18, 34, .* such as depth=\[20, 20\]"),
        (
            {"depth": 18},
            r"depth=18 is \[2, 2, 2, 2\], one for each stage, and strides=\[1, 2\] has another number of stages",
        ),
        ({"depth": [1, 2, 3]}, r"depth=\[1, 2, 3\] is .*, and strides=\[1, 2\] has another number of stages"),
        ({"depth": 0}, "depth=0: each stage needs a block"),
        ({"depth": 1.5}, "depth=1.5: each stage needs a block"),
        ({"depth": "six"}, "depth='six': each stage needs a block or more; pass their number, an int"),
        ({"width": 0}, "width=0: pass the number of channels"),
        ({"width": "abc"}, "width='abc': pass the number of channels"),
        ({"stem": "mnist"}, "stem='mnist' is none of 'cifar', 'imagenet'"),
        ({"split_dim": 0}, "split_dim=0: the streams would be different images"),
        ({"split_dim": 4}, "split_dim=4: an image batch has the dimensions 0 to 3"),
        ({"split_dim": 2, "shape": (1, 6, 6)}, "split_dim=2: the images of stage 1 are 16 x 3 x 3, and 3 cannot be"),
        ({"velocity": "zero"}, "velocity='zero' is neither null, for zero, nor 'learned'"),
        ({"velocity": "learned", "coupling": "additive"}, "only coupling=momentum with split_dim=null"),
        ({"velocity": "learned", "split_dim": 1}, "only coupling=momentum with split_dim=null"),
        ({"coupling": {"name": "momentum", "gamma": 1.5}}, "gamma=1.5"),
        ({"grid_bits": 12}, "on the grid it must be a power of two"),
    ],
    ids=str,
)
def test_errors_of_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumNet(**{**SMALL, **options})


def test_predictions_are_presented_as_classes(tmp_path):
    module = MomentumNetModule(**SMALL).eval()
    batches = [module.predict_step([torch.rand(4, 1, 8, 8), torch.arange(4)], i) for i in range(2)]
    cfg = SimpleNamespace(images=3, picture=tmp_path / "x.png", paths=SimpleNamespace(output_dir=tmp_path))
    rows = dict(module.present(batches, cfg))
    assert "of 8" in rows["right"] and (tmp_path / "x.png").exists()
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,label,predicted,probability" and len(lines) == 9


def test_a_stage_of_other_blocks():
    stage = Stage(nn.Identity(), nn.Conv2d(4, 4, 3, padding=1), coupling="midpoint", split_dim=None)
    assert stage(torch.rand(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def _compare(net, x, paths):
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert swap(net) == paths
    assert isinstance(net.get_submodule(paths[0]), ReversibleSequential)
    got = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm().clamp_min(1)


def _train_norms(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
