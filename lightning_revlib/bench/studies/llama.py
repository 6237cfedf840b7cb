"""Simulate steps of a Llama of 8 billion parameters: which of them fit on a card, without one and without the memory.

    revlib bench study=llama
    revlib bench study=llama lengths=[131072]

The highest bytes of one training step, with a batch of one sequence, under autocast to bfloat16. "full" trains float32
weights by AdamW; "LoRA" trains adapters of rank 16 in all linear layers, of weights in bfloat16. `memory` counts them
by fake tensors on the CPU, whose attention kernel holds what flash attention holds. Checkpoints are of each layer.
With offload their inputs wait for backward in the host's memory, which is not counted, as by
`torch.autograd.graph.save_on_cpu`; copies take no time here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_revlib.accounting.memory import memory
from lightning_revlib.accounting.result import Memory
from lightning_revlib.nn import swap
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.pretrained.lazy_logits import chunk_loss

CARD = 80 * 10**9  # bytes, of an 80 GB card
BRANCHES = [["input_layernorm", "self_attn"], ["post_attention_layernorm", "mlp"]]
MOMENTUM = {"name": "momentum", "gamma": 2.0**-4}


class Way(NamedTuple):
    """A way to train: options of the layers' stack, or None for ordinary autograd, and whether the loss is chunked.

    If offloaded, the layers are checkpoints of torch, whose inputs are on the host.
    """

    name: str
    options: dict[str, Any] | None
    is_chunked: bool = False
    is_offloaded: bool = False


def ways(depth: int) -> list[Way]:
    """Return the ways for a model of that many layers."""
    checkpointed = {
        "coupling": {"name": "momentum", "gamma": 0.0},
        "residual": True,
        "treatments": ["checkpoint"] * depth,
    }
    exact = {"coupling": MOMENTUM, "residual": True, "grid_bits": 12}
    return [
        Way("plain", None),
        Way("checkpoint", checkpointed),
        Way("checkpoint, chunked loss", checkpointed, True),
        Way("checkpoint with offload", None, is_offloaded=True),
        Way("checkpoint with offload, chunked loss", None, True, is_offloaded=True),
        Way("exact momentum", exact),
        Way("exact momentum, chunked loss", exact, True),
        Way("midpoint by branches, chunked loss", {"coupling": "midpoint", "branches": BRANCHES}, True),
    ]


def build(depth: int, length: int, lora: bool) -> tuple[Any, Any, str]:
    """Return the model on the meta device, the causal model in it, and the path of its layers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=depth, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=length,
    )  # fmt: skip
    with torch.device("meta"):
        causal: Any = transformers.LlamaForCausalLM(config).train()
        if not lora:
            return causal, causal, "model.layers"
        import peft

        model: Any = peft.get_peft_model(causal.bfloat16(), peft.LoraConfig(r=16, target_modules="all-linear"))
    return model, causal, "base_model.model.model.layers"


def offload_inputs(layers: Any) -> None:
    """Make each layer a checkpoint whose inputs are on the host until backward.

    Simulated tensors have no values to copy: what goes to the host is dropped, and what comes back is a new tensor.
    """
    for layer in layers:
        layer.forward = partial(_offloaded, layer.forward)


def _offloaded(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _to_host(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


def _from_host(packed: Any) -> Tensor:
    shape, stride, dtype = packed
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def step(way: Way, depth: int, length: int, lora: bool) -> Memory:
    """Return the simulated step of a way."""
    model, causal, path = build(depth, length, lora)
    if way.options is not None:
        swap(model, {path: way.options})
    if way.is_offloaded:
        offload_inputs(model.get_submodule(path))
    if way.is_chunked:
        chunk_loss(causal)
    ids = torch.ones(1, length, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        return memory(model, batch, torch.optim.AdamW, simulate=True, advice=False)


def rows(depth: int, length: int, lora: bool) -> Iterator[str]:
    """Yield a line of Markdown for each way."""
    for way in ways(depth):
        begin = time.perf_counter()
        found = step(way, depth, length, lora)
        cells = [found.after_forward.total, found.highest.total]
        fits = "yes" if found.highest.total <= CARD else "no"
        seconds = time.perf_counter() - begin
        yield f"| {way.name} | {' | '.join(map(format_bytes, cells))} | {fits} | {seconds:.0f} |"


def main(lengths: Sequence[int] | None = None, depths: Sequence[int] | None = None) -> None:
    """Print a table for each length of the sequence and each kind of training.

    Args:
        lengths: of the sequence, in tokens.
        depths: numbers of layers.
    """
    for depth in depths or (32,):
        for length in lengths or (32_768, 131_072):
            for kind in ("LoRA", "full"):
                print(f"\n{depth} layers, {length:,} tokens, {kind}\n")
                print("| | after forward | highest | on an 80 GB card | simulated in s |\n|---|--:|--:|---|--:|")
                for row in rows(depth, length, kind == "LoRA"):
                    print(row, flush=True)
