"""Compare LSH attention with other implementations: times, and bytes by sequence length.

    revlib bench study=attention threads=1

Attention is causal and has projections. Times are the least of `steps` interleaved rounds, in milliseconds, of forward
and of backward on (4, 1024, 256) with 8 heads of 32, chunks of 64, 16 buckets and 4 hashes, by the peers' rules: a
token sees tokens of other buckets, and a key that is found in two rounds counts twice. The processor's own time stands
beside the clock's, since it can be compared on a busy machine. Bytes are the most alive in backward, counted, of one
sequence of each of `lengths`. A peer that is not installed is left out:

    pip install transformers
    pip install --no-deps reformer-pytorch==1.4.4 einops axial-positional-embedding local-attention
    pip install --no-deps product-key-memory colt5-attention hyper-connections torch-einops-utils
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Sequence

import torch
from torch import nn

from lightning_revlib.nn import MemoryMeter
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.recipes.models.attention import LSHAttention

SHAPE = (4, 1024, 256)


def implementations() -> dict[str, nn.Module]:
    """Return ours and the installed peers' attention, by name."""
    dim, heads, options = SHAPE[2], 8, {"hashes": 4, "chunk": 64, "full_below": 0}
    found: dict[str, nn.Module] = {
        "lightning_revlib": LSHAttention(dim, heads, buckets=16, **options),
        "lightning_revlib, the paper's rules": LSHAttention(
            dim, heads, buckets=16, within_bucket=True, duplicates=False, **options
        ),
    }
    if importlib.util.find_spec("reformer_pytorch"):
        from reformer_pytorch import LSHSelfAttention

        found["reformer-pytorch"] = LSHSelfAttention(dim, heads=heads, bucket_size=64, n_hashes=4, causal=True)
    if importlib.util.find_spec("transformers"):
        from transformers import ReformerConfig
        from transformers.models.reformer import modeling_reformer

        config = ReformerConfig(
            hidden_size=dim, num_attention_heads=heads, attention_head_size=dim // heads, num_hashes=4, num_buckets=16,
            lsh_attn_chunk_length=64, lsh_num_chunks_before=1, lsh_num_chunks_after=0, is_decoder=True,
            lsh_attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        found["transformers"] = modeling_reformer.LSHSelfAttention(config, layer_idx=0)
    return found


def step(net: nn.Module, x: torch.Tensor) -> list[float]:
    """Return the seconds of forward and backward by the clock, then by the processor."""
    marks = []
    for part in range(3):
        marks.append((time.perf_counter(), time.process_time()))
        if part == 0:
            y = net(x)
            y = y if isinstance(y, torch.Tensor) else y.hidden_states
        elif part == 1:
            y.sum().backward()
    return [after[clock] - before[clock] for clock in (0, 1) for before, after in itertools.pairwise(marks)]


def main(
    *,
    lengths: Sequence[int] = (1024, 4096, 16384, 65536),
    batch: int = SHAPE[0],
    steps: int = 7,
    threads: int | None = None,
    seed: int = 0,
) -> None:
    """Print the table of times and the table of bytes; `threads` defaults to torch's own number."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    nets, x = implementations(), torch.randn(batch, *SHAPE[1:], requires_grad=True)
    least = {name: [float("inf")] * 4 for name in nets}
    for _ in range(steps):
        for name, net in nets.items():
            least[name] = [min(pair) for pair in zip(least[name], step(net, x), strict=True)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | forward / backward, ms | processor's, ms | together, over ours |\n|---|---|---|---|")
    ours = sum(least["lightning_revlib"][2:])
    for name, seconds in least.items():
        a, b, c, d = (1000 * s for s in seconds)
        print(f"| {name} | {a:.0f} / {b:.0f} | {c:.0f} / {d:.0f} | {(c + d) / 1000 / ours:.1f} |")
    print("\n| length | peak bytes | a token |\n|---|---|---|")
    for length in lengths:
        net = LSHAttention(SHAPE[2], 8, hashes=4, chunk=64)
        with MemoryMeter() as meter:
            net(torch.randn(1, length, SHAPE[2])).sum().backward()
        print(f"| {length} | {format_bytes(meter.peak)} | {format_bytes(meter.peak // length)} |")
