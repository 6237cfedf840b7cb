"""i-RevNet: the paper's sizes, the inverse of trained weights, and errors."""

from __future__ import annotations

import pytest
import torch

from lightning_revlib.nn import COUPLINGS, ReversibleSequential, swap
from lightning_revlib.recipes.models.irevnet import IRevNet, IRevNetModule, SplitPad

SMALL = {"shape": (1, 8, 8), "depth": 3, "channels": (16, 64), "strides": (1, 2), "initial_psi": 2}
IMAGENET = {
    "shape": (3, 224, 224),
    "classes": 1000,
    "depth": [6, 16, 72, 6],
    "channels": (24, 96, 384, 1536),
    "strides": (2, 2, 2, 2),
    "initial_psi": 2,
    "dropout": 0.0,
}


@pytest.mark.parametrize(("options", "millions"), [({}, 6.27), (IMAGENET, 125.1)], ids=["cifar", "imagenet"])
def test_it_has_as_many_parameters_as_in_the_paper(options, millions):
    with torch.device("meta"):
        net = IRevNet(**options)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_imagenet_is_bijective_without_padding():
    with torch.device("meta"):
        net = IRevNet(**IMAGENET).eval()
        logits, z = net(torch.empty(1, 3, 224, 224), bijective=True)
    assert logits.shape == (1, 1000)
    assert z.shape == (1, 3072, 7, 7)
    assert z.numel() == 3 * 224 * 224


def test_cifar_streams_share_the_padding():
    pad = SplitPad(3, 16, 2)
    y = pad(torch.ones(1, 3, 4, 4))
    assert y.shape == (1, 32, 4, 4)
    assert y[0, :, 0, 0].nonzero().flatten().tolist() == [0, 1, 16]
    assert torch.equal(pad.inverse(y), torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize("coupling", [name for name, cls in COUPLINGS.items() if not cls.needs_grid])
@pytest.mark.parametrize("split_dim", [1, 2, 3, -1, -3])
def test_inverse_for_every_split_and_coupling(split_dim, coupling):
    torch.manual_seed(0)
    net = _disturb(IRevNet(**SMALL, split_dim=split_dim, coupling=coupling))
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        logits, z = net(x, bijective=True)
        assert logits.shape == (4, 10)
        assert z.numel() == x.shape[0] * z[0].numel() >= x.numel()
        assert (net.inverse(z) - x).norm() / x.norm() < 1e-5


def test_a_stride_of_two_sees_its_stream_before_psi():
    net = IRevNet(**SMALL)
    sizes = [(m.body[0] if i == 0 else m.body[2]).in_channels for i, m in enumerate(_bottlenecks(net))]
    assert sizes == [16, 16, 16, 16, 64, 64]  # the fourth, of stride 2, undoes psi: 64 channels are 16 again
    assert _bottlenecks(net)[0].body[0].__class__.__name__ == "Conv2d"  # no BatchNorm before the first
    assert [m.stride for m in _bottlenecks(net)] == [1, 1, 1, 2, 1, 1]


def test_one_stack_and_the_same_gradients_when_swapped():
    torch.manual_seed(0)
    net, x = IRevNet(**SMALL).double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert swap(net) == ["stack"]
    assert isinstance(net.stack, ReversibleSequential)
    torch.manual_seed(1)
    got = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm().clamp_min(1)


def test_depth_is_one_number_or_one_for_each_stage():
    assert len(_bottlenecks(IRevNet(**{**SMALL, "depth": 5}))) == 10
    assert len(_bottlenecks(IRevNet(**{**SMALL, "depth": [2, 4]}))) == 6


def test_hyperparameters_are_plain_and_hold_no_optimizer():
    module = IRevNetModule(**SMALL, coupling={"name": "momentum", "gamma": 0.5}, optimizer=torch.optim.SGD)
    assert dict(module.hparams) == {**SMALL, "coupling": {"name": "momentum", "gamma": 0.5}}
    assert module.predict_step([torch.rand(2, 1, 8, 8)], 0)["reconstruction"].shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": [1, 2, 3]}, r"depth=\[1, 2, 3\], channels=\[16, 64\] and strides=\[1, 2\]"),
        ({"depth": 0}, "depth=0: each stage needs a block"),
        ({"depth": 1.5}, "depth=1.5: each stage needs a block"),
        ({"depth": "six"}, "depth='six': each stage needs a block or more; pass their number, an int"),
        ({"strides": (1, 3)}, r"strides=\[1, 3\]: a stage's stride is 1 or 2"),
        ({"channels": (16, 32)}, "16 channels become 64 at a stride of 2, not 32"),
        ({"channels": (2, 8), "bottleneck": 2, "initial_psi": 4}, "starts with 4 channels, the image has 16 .*to 8 or"),
        ({"channels": (2, 8)}, r"channels\[0\]=2 must be .* at least bottleneck=4"),
        ({"split_dim": None}, "split_dim=None: one output does not determine two streams"),
        ({"split_dim": 0}, "split_dim=0: the streams would be different images"),
        ({"split_dim": 4}, "split_dim=4: an image batch has the dimensions 0 to 3"),
        ({"shape": (1, 7, 8)}, "an image of 7 x 8 pixels shrinks 4 times .* 7 is not a multiple of 4"),
        ({"shape": (1, 12, 8), "split_dim": 2}, "halved along split_dim=2: 12 is not a multiple of 8"),
        ({"shape": (8, 8)}, r"shape=\[8, 8\]"),
        ({"coupling": "momentun"}, "coupling='momentun' is unknown.* did you mean 'momentum'"),
    ],
)
def test_errors_of_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        IRevNet(**{**SMALL, **options})


def _bottlenecks(net):
    return [m for m in net.stack if hasattr(m, "body")]


def _disturb(net):
    """Give BatchNorm statistics and weights as after training, with which an inverse can be wrong."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, std=0.3)
    for _ in range(3):
        net(torch.rand(8, 1, 8, 8))
    return net.eval()


def test_on_the_grid_it_inverts_bit_for_bit():
    net = _disturb(IRevNet(**SMALL, grid_bits=12))
    x = (torch.rand(4, *SMALL["shape"]) * 2**12).round() / 2**12
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x, bijective=True)[1]), x)
