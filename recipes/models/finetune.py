"""Fine-tune a pretrained causal language model of transformers.

Under a reversible strategy the model's layers become exact momentum, v' = gamma v + (1 - gamma) f(x), x' = x + v', with
a small gamma = 2^-k: nearly the pretrained function, whose training holds two streams and k bits per element and layer.
The loss is computed by chunks, without the whole logits. Under strategy="auto" the model trains as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn import swap
from lightning_revlib.nn.convert.swap import Targets, find, stacks
from lightning_revlib.pretrained.lazy_logits import chunk_loss
from lightning_revlib.pretrained.load import absolute, load_model, load_tokenizer
from lightning_revlib.recipes.display.panel import Row
from lightning_revlib.recipes.tasks.base import OptimizerFactory, RecipeModule, SchedulerFactory

NEARLY_PRETRAINED = {"name": "momentum", "gamma": 2.0**-5}


class FineTuneModule(RecipeModule):
    """Fine-tune a causal language model on blocks of tokens (B, N); log `loss`, in nats per token.

    >>> trainer = lightning.Trainer(strategy="reversible", max_epochs=1)
    >>> module = FineTuneModule("my_model", optimizer=partial(torch.optim.AdamW, lr=1e-4))
    >>> trainer.fit(module, TextFile("book.txt", length=512, tokenizer="my_model"))

    A checkpoint names the model, which is loaded again with it. With `lora` a checkpoint holds the adapters only.

    Args:
        model: the pretrained model, as in `load_model`.
        optimizer, scheduler: see `RecipeModule`.
        targets: what a reversible strategy swaps: the path of a ModuleList in the model or a glob, such as "*.layers",
            or targets as in `swap`. None finds the model's list of layers.
        coupling, residual, grid_bits: options of the stack, unless `targets` has its own.
        loss_chunk: number of tokens whose logits are in memory at a time, of reversible training and of evaluation;
            None for all.
        lora: arguments of `peft.LoraConfig`, such as {"r": 8}; without, or with r None, all parameters are trained.
        tokenizer, length: of the data: the model whose tokenizer was used, and the number of tokens in a block.

    Raises:
        ValueError: for a model that cannot be loaded, targets or adapters that match nothing, and data that are not
            tokens of this model.
    """

    is_pretrained = True  # `revlib train` tests the original, too

    def __init__(
        self,
        model: str,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        targets: str | Mapping[str, Any] | None = None,
        coupling: str | Mapping[str, Any] = NEARLY_PRETRAINED,
        residual: bool = True,
        grid_bits: int | str | None = "auto",
        loss_chunk: int | None = 256,
        lora: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        length: int | None = None,
        **data: Any,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if data or tokenizer is not None:
            check_tokens(tokenizer, model)
        model, tokenizer = absolute(model), absolute(tokenizer)  # for checkpoints
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = load_model(model).train()
        check_length(self.net.config, model, length)
        if lora is not None and lora.get("r") is not None:
            adapt(self.net, lora)
        options = {"coupling": coupling, "residual": residual, "grid_bits": grid_bits}
        if targets is None or isinstance(targets, str):
            targets = {targets or longest_list(self.net): options}
        try:
            find(self.net, targets)
        except ValueError as error:
            raise ValueError(f"targets={list(targets)}: {error}") from error
        self.reversible_targets: Targets = {f"net.{path}": of_path for path, of_path in targets.items()}
        self.loss_chunk = loss_chunk
        self.example_input_array = None if length is None else torch.zeros(1, length, dtype=torch.long)

    def setup(self, stage: str) -> None:
        """Check that the data are tokens of this model; ValueError if not."""
        data = getattr(self.trainer, "datamodule", None)
        if (arguments := getattr(data, "model_arguments", None)) is not None:
            check_tokens(arguments.get("tokenizer"), self.hparams["model"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss of tokens (B, N); that of ordinary layers has the whole logits, as in transformers."""
        chunk_loss(self.net, self.loss_chunk if stacks(self.net) else None)
        loss: Tensor = self.net(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self(batch[0])
        self._log("train", loss, batch[0])
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._log("val", self.evaluate(batch[0]), batch[0])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._log("test", self.evaluate(batch[0]), batch[0])

    def evaluate(self, tokens: Tensor) -> Tensor:
        """Return the loss, with the logits of about `loss_chunk` tokens at a time."""
        rows = len(tokens) if self.loss_chunk is None else max(1, self.loss_chunk // tokens.shape[1])
        return torch.stack([self(part) * len(part) for part in tokens.split(rows)]).sum() / len(tokens)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the tokens of the first batch, from which `present` takes the beginning of the text."""
        return batch[0][: 0 if batch_idx else None].cpu()

    def present(self, batches: list[Tensor], cfg: Any) -> list[Row]:
        """Return the rows to print: text that continues `prompt`, or the beginning of held-out text if it is null."""
        tokenizer, prompt = load_tokenizer(self.hparams["model"]), cfg.get("prompt")
        tokens = batches[0][:1, :64] if prompt is None else tokenizer(str(prompt), return_tensors="pt").input_ids.long()
        if not tokens.numel():
            raise ValueError(f"prompt={prompt!r} has no tokens; pass a word, or null for held-out text")
        written = self.generate(tokens, cfg)[0, tokens.shape[1] :]
        return [("prompt", tokenizer.decode(tokens[0])), ("text written", tokenizer.decode(written))]

    def generate(self, tokens: Tensor, cfg: Any) -> Tensor:
        """Return `tokens` and up to `cfg.count` more; `cfg.temperature` 0 takes the likeliest token each time."""
        temperature, top_k = cfg.get("temperature", 1.0), cfg.get("top_k")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature}, top_k={top_k}: pass 0 or more, and 1 or more or null")
        drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
        tokens = tokens.to(self.device)
        written: Tensor = self.net.eval().generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=cfg.get("count", 256),
            pad_token_id=self.net.config.eos_token_id,
            **(drawn if temperature else {"do_sample": False}),
        )
        return written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out, which `model` has."""
        for name in self._frozen():
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put frozen weights back, and swap what was swapped in training, with its grid."""
        checkpoint["state_dict"] = self._frozen() | checkpoint["state_dict"]
        if saved := checkpoint.get("reversible_targets"):
            self.reversible_targets = saved
            swap(self, saved)
        super().on_load_checkpoint(checkpoint)

    def _frozen(self) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        weights = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return {name: x for name, x in self.state_dict().items() if name in weights - trained}

    def _log(self, stage: str, loss: Tensor, tokens: Tensor) -> None:
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": len(tokens), "sync_dist": True}
        self.log(f"{stage}/loss", loss.detach(), prog_bar=stage == "val", **options)


def check_tokens(tokenizer: str | None, model: str) -> None:
    """Raise ValueError if data are images, bytes, or tokens of another model's."""
    if absolute(tokenizer) != absolute(model):
        what = "no tokens" if tokenizer is None else f"tokens of {tokenizer}"
        raise ValueError(
            f"data.tokenizer={tokenizer}: the data are {what}, and the model is {model}; take data=text_file or"
            f" data=topics, with data.tokenizer={model}"
        )


def check_length(config: Any, model: str, length: int | None) -> None:
    """Raise ValueError for blocks that are longer than the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if length is not None and positions is not None and length > positions:
        raise ValueError(f"data.length={length}: {model} has {positions} positions; take this length at most")


def adapt(model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Freeze the model and add LoRA's adapters; ValueError if PEFT is missing or does not take these options."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora.r={lora['r']} needs peft: pip install peft") from error
    given = {name: x for name, x in lora.items() if x is not None}
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**given), model)
    except (TypeError, ValueError) as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"lora={given}: {error}; linear layers are {', '.join(sorted(linear))}, such as"
            f" lora.target_modules=[{min(linear, default='')}]"
        ) from error


def longest_list(model: nn.Module) -> str:
    """Return the path of the longest nn.ModuleList that is in no other; ValueError if there is none, or several."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{above}.") for above in found):
            found[path] = len(module)
    longest = [path for path, count in found.items() if 1 < count == max(found.values())]
    if len(longest) == 1:
        return longest[0]
    what = f"several lists of layers, {', '.join(longest)}" if longest else "no nn.ModuleList of layers"
    raise ValueError(f"targets=None: {type(model).__name__} has {what}; name one by targets, such as 'model.layers'")
