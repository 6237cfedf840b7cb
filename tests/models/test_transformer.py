"""`nn.TransformerEncoder` and `nn.TransformerDecoder`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training


class Encoding(nn.Module):
    def __init__(self, depth: int, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(16, 3)

    def forward(self, batch: Any) -> Tensor:
        x = self.encoder(self.embed(batch["x"]), src_key_padding_mask=batch["padding"])
        return nn.functional.cross_entropy(self.head(x[:, 0]), batch["y"])


class Translating(nn.Module):
    """A decoder whose memory needs grad, as it comes from an encoder; both are swapped."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.source = nn.Linear(16, 16)
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, depth)
        self.head = nn.Linear(16, 20)

    def forward(self, batch: Any) -> Tensor:
        memory, x = self.source(self.embed(batch["x"])), batch["x"]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1] - 1, dtype=memory.dtype)
        out = self.decoder(self.embed(x[:, :-1]), memory, tgt_mask=mask, memory_key_padding_mask=batch["padding"],
                           tgt_is_causal=True)  # fmt: skip
        return nn.functional.cross_entropy(self.head(out).flatten(0, 1), x[:, 1:].flatten())


def batch() -> Any:
    padding = torch.zeros(6, 10, dtype=torch.bool)
    padding[0, 7:] = True
    return {"x": torch.randint(20, (6, 10)), "y": torch.arange(6) % 3, "padding": padding}


FAMILIES = {
    "encoder, norm first": Family(
        lambda d: Encoding(d, True), batch, lambda m, b: m(b), "encoder.layers", {"residual": True}
    ),
    "encoder, norm last": Family(
        lambda d: Encoding(d, False), batch, lambda m, b: m(b), "encoder.layers", {"residual": True}
    ),
    "decoder": Family(Translating, batch, lambda m, b: m(b), "decoder.layers", {"residual": True}),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name: str, coupling: str) -> None:
    check_gradients(FAMILIES[name], coupling)


@pytest.mark.parametrize("name", FAMILIES)
def test_memory(name: str) -> None:
    check_memory(FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_training(name: str, tmp_path: Any) -> None:
    check_training(FAMILIES[name], tmp_path)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_of_evaluation(norm_first: bool, coupling: str) -> None:
    """Without gradients layers run as one fused kernel, and on nested tensors: they still make the same step."""
    model, data = Encoding(3, norm_first).eval(), batch()
    options = {**COUPLINGS[coupling], **({"grid_bits": 12} if coupling == "bdia" else {})}
    revlib.swap(model, {"encoder.layers": {"residual": True, **options}})
    with torch.no_grad():
        if coupling == "bdia" and not norm_first:
            with pytest.raises(TypeError, match="set use_nested_tensor = False on your"):
                model(data)
            model.encoder.use_nested_tensor = False
        fused = model(data)
    assert torch.allclose(fused, model(data), atol=1e-6)
