"""Cross-entropy by chunks equals that of whole logits, for causal models as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_revlib as revlib

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {
        "vocab_size": 97,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {} if family == "GPT2" else SIZES
    config = getattr(transformers, f"{family}Config")(**sizes, **FAMILIES[family])
    causal = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, causal)(config).double().train()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


def inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 97, (3, 13), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels


def shifted(model: nn.Module, labels: Tensor | None = None, **options: Any) -> Tensor:
    """As training scripts compute the loss of a model's logits by themselves."""
    ids, given = inputs()
    labels = given if labels is None else labels
    logits = model(input_ids=ids).logits
    return functional.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, logits.shape[-1]), labels[..., 1:].reshape(-1), **options
    )


LOSSES: dict[str, Any] = {
    "the model's": lambda model: model(input_ids=inputs()[0], labels=inputs()[1]).loss,
    "of a whole accumulation": lambda model: (
        model(input_ids=inputs()[0], labels=inputs()[1], num_items_in_batch=50).loss
    ),
    "shifted": shifted,
    "smoothed": lambda model: shifted(model, label_smoothing=0.1, reduction="sum"),
    "ignoring a word": lambda model: shifted(
        model, inputs()[0], ignore_index=int(inputs()[0][0, 5]), label_smoothing=0.2
    ),
    "of the logits": lambda model: model(input_ids=inputs()[0]).logits.square().mean(),
    "by token": lambda model: shifted(model, reduction="none").square().sum(),
    "weighted": lambda model: shifted(model, weight=torch.linspace(0, 1, 97, dtype=torch.float64)),
    "of probabilities": lambda model: model(input_ids=inputs()[0]).logits.log_softmax(-1).square().sum(),
}

IN_FLOAT32 = ("the model's", "of a whole accumulation")  # transformers' own losses call logits.float()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loss_of_whole_logits(family: str, loss: str) -> None:
    model = make(family)
    plain = gradients(model, LOSSES[loss](model))
    revlib.chunk_loss(model, tokens=5)
    close = 1e-6 if loss in IN_FLOAT32 else 1e-12
    for x, y in zip(plain, gradients(model, LOSSES[loss](model)), strict=True):
        torch.testing.assert_close(y, x, rtol=close, atol=close)


def test_together_with_a_swap_and_copies() -> None:
    model = make("Llama")
    plain = gradients(model, LOSSES["the model's"](model))
    revlib.swap(model, {"model.layers": {"coupling": {"name": "momentum", "gamma": 0.0}, "residual": True}})
    revlib.chunk_loss(model, tokens=5)
    for each in (model, copy.deepcopy(model)):
        for x, y in zip(plain, gradients(each, LOSSES["the model's"](each)), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)  # the loss is computed in float32


def test_evaluation_and_generation_are_as_before() -> None:
    model, ids = make("Llama"), inputs()[0]
    revlib.chunk_loss(model)
    model.eval()
    logits = model(input_ids=ids).logits
    assert type(logits) is Tensor
    assert model.generate(ids, max_new_tokens=2).shape == (3, 15)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    revlib.chunk_loss(model, tokens=None)
    assert "forward" not in vars(model)
    assert type(model(input_ids=ids).logits) is Tensor


@pytest.mark.parametrize("classes", [50_000, 150_000])
def test_logits_are_never_whole(classes: int) -> None:
    hidden, head = torch.randn(256, 8, requires_grad=True), nn.Linear(8, classes, bias=False)
    labels = torch.randint(0, classes, (256,))
    peaks = []
    for run in (
        lambda: functional.cross_entropy(head(hidden), labels),
        lambda: revlib.chunked_cross_entropy(hidden, head, labels, tokens=16),
    ):
        with revlib.MemoryMeter() as meter:
            run().backward()
        peaks.append(meter.peak)
        head.zero_grad()
    logits = 256 * classes * 4
    assert peaks[0] > 2 * logits
    assert peaks[1] < 0.3 * logits  # three times a chunk's, and gradients of the weights


@pytest.mark.parametrize("classes", [50_000, 150_000])
def test_a_model_holds_no_logits(classes: int) -> None:
    """What `report` counts of a step, with the layers swapped."""
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": classes})
    model, ids = transformers.LlamaForCausalLM(config).train(), torch.randint(1, classes, (2, 32))
    call: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    targets = {"model.layers": {"coupling": "midpoint", "residual": True}}
    plain = revlib.report(model, targets=targets, **call)
    revlib.chunk_loss(model, tokens=8)
    chunked = revlib.report(model, targets=targets, **call)
    logits = 64 * classes * 4
    assert logits < plain.logits < 3.1 * logits and "chunk_loss(model)" in str(plain)
    assert chunked.logits == 0 and "chunk_loss" not in str(chunked)
    assert plain.held_after - chunked.held_after > 0.99 * plain.logits
    assert plain.peak_after > 2.9 * logits and chunked.peak_after < logits


class Rows(TorchDispatchMode):
    """Notes the most rows that any tensor as wide as the vocabulary has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == SIZES["vocab_size"]:
            self.most = max(self.most, out.shape[:-1].numel())
        return out


@pytest.mark.parametrize("loss", ["the model's", "of a whole accumulation", "shifted", "smoothed", "ignoring a word"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_model_are_never_whole(family: str, loss: str) -> None:
    model, found = make(family), []
    for tokens in (None, 5):
        revlib.chunk_loss(model, tokens=tokens)
        with Rows() as rows:
            LOSSES[loss](model).backward()
        found.append(rows.most)
    assert found == [39, 16]  # all tokens; the weights' 16 columns, and chunks of 5


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_logits_of_an_encoder_and_decoder_are_never_whole(family: str) -> None:
    sizes = {"d_model": 16, "vocab_size": 97, "decoder_start_token_id": 0}
    if family == "T5":
        sizes |= {"d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0}
    else:
        sizes |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).double().train()
    if family == "Bart":
        model.final_logits_bias.normal_()
    ids, labels = inputs()
    found, most = [], []
    for tokens in (None, 5):
        revlib.chunk_loss(model, tokens=tokens)
        with Rows() as rows:
            found.append(gradients(model, model(input_ids=ids, labels=labels).loss))
        most.append(rows.most)
    assert most == [39, 16]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_logits_take_the_operators_of_a_tensor() -> None:
    model, ids = make("Llama").train(), inputs()[0]
    revlib.chunk_loss(model)
    lazy = model(input_ids=ids, labels=ids).logits
    logits = lazy + 0
    assert type(logits) is Tensor
    assert (lazy.size(), lazy.size(-1), lazy.dim(), lazy.ndim) == (logits.shape, 97, 3, 3)
    for ours, theirs in (
        (1 - lazy, 1 - logits),
        (-lazy * 2, -logits * 2),
        (2 * lazy**2, 2 * logits**2),
        (abs(lazy), abs(logits)),
        (lazy > 0, logits > 0),
        (lazy == lazy, logits == logits),
        (list(lazy)[1], logits[1]),
        (lazy @ logits.mT, logits @ logits.mT),
    ):
        torch.testing.assert_close(ours, theirs)
    assert len(lazy) == len(ids)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="tokens=0: pass the number of rows"):
        revlib.chunk_loss(make("Llama"), tokens=0)
    with pytest.raises(TypeError, match=r"Linear does not say which module is its head.*chunked_cross_entropy"):
        revlib.chunk_loss(nn.Linear(2, 2))
    hidden, labels = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden of shape \[2, 2, 2\].*pass \(rows, width\)"):
        revlib.chunked_cross_entropy(hidden.view(2, 2, 2), nn.Linear(2, 3), labels)
    with pytest.raises(ValueError, match="reduction='none': pass 'mean' or 'sum'"):
        revlib.chunked_cross_entropy(hidden, nn.Linear(2, 3), labels, reduction="none")
    with pytest.raises(ValueError, match="tokens=0: pass the number of rows"):
        revlib.chunked_cross_entropy(hidden, nn.Linear(2, 3), labels, tokens=0)
