from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lightning_revlib as revlib
from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training

transformers = pytest.importorskip("transformers")
CHECKPOINTS_CALLS = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)  # until 5.22 or so


def build(depth: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=depth, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def batch() -> Any:
    ids, mask = torch.randint(1, 50, (4, 16)), torch.ones(4, 16, dtype=torch.long)
    mask[0, 10:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False}


GPT2 = Family(build, batch, lambda model, batch: model(**batch).loss, "transformer.h", {"residual": True})


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients(coupling: str) -> None:
    check_gradients(GPT2, coupling)


def test_memory() -> None:
    check_memory(GPT2)


def test_training_then_generation(tmp_path: Any) -> None:
    model = check_training(GPT2, tmp_path).eval()
    prompt, mask = torch.randint(1, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **settings)  # type: ignore[operator]
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))  # type: ignore[operator]
    assert cached.shape == (2, 11)


def test_caches_in_training() -> None:
    """An empty one, which the model makes unasked, is left out; with one that is not, activations are stored."""
    model, ids = build(3).double(), torch.randint(1, 50, (2, 8))
    twin = build(3).double()
    twin.load_state_dict(model.state_dict())
    revlib.swap(model, GPT2.targets(coupling="midpoint"))
    revlib.swap(twin, GPT2.targets(coupling="midpoint", store_last=3))
    model.eval(), twin.eval()
    with pytest.warns(UserWarning, match="the cache stays empty .*; pass use_cache=False"):
        loss = model(ids, labels=ids).loss
    assert torch.allclose(loss, twin(ids, labels=ids, use_cache=False).loss)
    loss.backward()
    with torch.no_grad():
        past = model(ids[:, :3]).past_key_values
        assert past.get_seq_length() == 3
    with pytest.warns(UserWarning, match="cache that is not empty: activations are stored"):
        loss = model(ids[:, 3:], past_key_values=past, labels=ids[:, 3:]).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.transformer.h.parameters())


def test_hidden_states_of_all_layers() -> None:
    model, ids = build(3), torch.randint(1, 50, (2, 8))
    revlib.swap(model, GPT2.targets(coupling="midpoint"))
    with torch.no_grad():
        assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    model, found = model.double().eval(), []
    for options in ({}, {"store_last": 3}):
        revlib.swap(model, GPT2.targets(coupling="midpoint", **options))
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for state in states:
            state.retain_grad()
        model.zero_grad()
        torch.stack(states).square().sum().backward()
        found.append([*[state.grad for state in states], *[p.grad for p in model.parameters() if p.grad is not None]])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(CHECKPOINTS_CALLS, reason="checkpoints round the layers, which is refused")
def test_gradient_checkpointing_inside() -> None:
    model, expected = build(3).double(), build(3).double()
    expected.load_state_dict(model.state_dict())
    for each in (model, expected):
        revlib.swap(each, GPT2.targets(coupling="midpoint"))
    model.gradient_checkpointing_enable()
    data = batch()
    one, other = GPT2.gradients(model, data), GPT2.gradients(expected, data)
    assert all(torch.allclose(one[name], other[name], rtol=1e-10) for name in other)


def test_saved_pretrained_and_restored(tmp_path: Any) -> None:
    model, ids = build(3).eval(), torch.randint(1, 50, (2, 8))
    plain = model(ids).logits
    revlib.swap(model, GPT2.targets(coupling="midpoint"))
    model.save_pretrained(tmp_path / "swapped")
    revlib.restore(model)
    model.save_pretrained(tmp_path / "restored")
    for name in ("swapped", "restored"):
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        assert torch.equal(again(ids).logits, plain)


def test_attention_and_feed_forward_as_steps_of_their_own() -> None:
    branches = {"branches": [["ln_1", "attn"], ["ln_2", "mlp"]]}
    family = replace(GPT2, options=branches)
    check_gradients(family, "midpoint")
    model, data = build(3).eval(), batch()
    expected = model(**data).loss
    revlib.swap(model, family.targets(coupling={"name": "momentum", "gamma": 0.0}))
    assert torch.allclose(model(**data).loss, expected)
