"""Language models: loss, bits per byte and generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_revlib.recipes.display.panel import Row
from lightning_revlib.recipes.tasks.base import OptimizerFactory, RecipeModule, SchedulerFactory


class LanguageModel(RecipeModule):
    """Train a network from tokens (B, N) to logits (B, N, vocab), each given the tokens before it.

    >>> LanguageModel(Reformer(length=256, dim=64, depth=2), optimizer=partial(torch.optim.AdamW, lr=3e-3))

    A batch is a list of the tokens and, if they differ from the tokens, of the targets. A target of -100 is not
    counted. Logs `loss` in nats, `bpb` in bits per token (per byte, if tokens are bytes), and `acc`.

    Args:
        net: the network, with an attribute `vocab` and a method `generate`.
        optimizer, scheduler: see `RecipeModule`.
    """

    def __init__(
        self, net: Any, *, optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.net: Any = net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "test")
        known = getattr(self.trainer.datamodule, "known", {}) if batch_idx == 0 else {}
        known = {f"test/{name}": value for name, value in known.items()}
        self.log_dict(known, on_step=False, on_epoch=True, sync_dist=True)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the tokens of the first batch, from which `present` takes the beginning of the text."""
        return batch[0][: 0 if batch_idx else None].cpu()

    def present(self, batches: list[Tensor], cfg: Any) -> list[Row]:
        """Return the rows to print: text that continues `prompt`, or the beginning of held-out text if it is null."""
        prompt = cfg.get("prompt")
        tokens = batches[0][:1, :64] if prompt is None else torch.tensor([list(str(prompt).encode())]).long()
        if int(tokens.max() if tokens.numel() else 0) >= self.net.vocab:
            raise ValueError(f"prompt={prompt!r}: the model knows the tokens 0 to {self.net.vocab - 1} only")
        options = {"temperature": cfg.get("temperature", 1.0), "top_k": cfg.get("top_k")}
        written = self.net.generate(tokens.to(self.device), cfg.get("count", 256), **options)[0, tokens.shape[1] :]
        return [("prompt", as_text(tokens[0])), ("text written", as_text(written))]

    def _step(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        logits, targets = self(batch[0]).flatten(0, 1), batch[-1].flatten()
        loss = F.cross_entropy(logits, targets)
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": len(batch[0]), "sync_dist": True}
        self.log_dict({f"{stage}/loss": loss, f"{stage}/acc": self.accuracy(logits, targets)}, **options)
        self.log(f"{stage}/bpb", loss.detach() / math.log(2), prog_bar=stage == "val", **options)
        return loss

    @staticmethod
    def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of the counted targets that have the largest logit."""
        return (logits.argmax(-1) == targets).sum() / (targets != -100).sum()


def as_text(tokens: Tensor) -> str:
    """Return bytes as text, with a mark for each byte that is none."""
    return bytes(tokens.clamp(0, 255).tolist()).decode("utf-8", errors="replace")
