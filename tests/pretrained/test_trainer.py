"""Where people train: transformers' Trainer, TRL, accelerate, PEFT and Lightning take the same steps."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.pretrained.test_loss import make

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, RATE = 4, 1e-2
MOMENTUM: dict[str, Any] = {
    "model.layers": {"coupling": {"name": "momentum", "gamma": 0.125}, "residual": True, "grid_bits": 12}
}


def examples() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 97, (2 * STEPS, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def model() -> nn.Module:
    return make("Llama").float()


def swapped() -> nn.Module:
    made = model()
    revlib.swap(made, MOMENTUM)
    revlib.chunk_loss(made, tokens=7)
    return made


def batches() -> list[dict[str, Tensor]]:
    rows = examples()
    return [
        {name: torch.stack([row[name] for row in rows[i : i + 2]]) for name in rows[0]} for i in range(0, len(rows), 2)
    ]


def arguments(folder: Path, cls: Any = None, **options: Any) -> Any:
    return (cls or transformers.TrainingArguments)(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_losses() -> list[float]:
    """Those of a loop in plain PyTorch, of the stored run: what each trainer has to reach."""
    made = swapped()
    revlib.swap(made, {"model.layers": {"store_last": 2}})
    revlib.chunk_loss(made, tokens=None)
    optimizer, found = torch.optim.SGD(made.parameters(), lr=RATE), []
    for batch in batches():
        loss = made(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_transformers_trainer(tmp_path: Path) -> None:
    callback = revlib.ReversibleTrainerCallback(MOMENTUM, chunked_loss=True, every_n_steps=2)
    trainer = InOrder(model(), arguments(tmp_path), train_dataset=examples(), callbacks=[callback])
    assert isinstance(trainer.model.model.layers, revlib.ReversibleModuleList)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(plain_losses(), abs=1e-5)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["drift"] for entry in logged] == [0.0] * STEPS
    assert ["activation_peak_bytes" in entry for entry in logged] == [True, False, True, False]
    assert 0 < logged[0]["activation_held_bytes"] < logged[0]["activation_peak_bytes"]


def test_resuming_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    def train(folder: Path, **resume: Any) -> list[float]:
        options = arguments(folder)
        options.save_strategy, options.save_steps = "steps", 2
        callback = revlib.ReversibleTrainerCallback(MOMENTUM, memory_budget="1MiB")
        trainer = InOrder(model(), options, train_dataset=examples(), callbacks=[callback])
        trainer.train(**resume)
        return losses_of(trainer)

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2")) == whole


def test_lightning() -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = model(), []

        def training_step(self, batch: Any) -> Tensor:
            loss: Tensor = self.net(**batch, use_cache=False).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    module = Module()
    strategy = revlib.ReversibleStrategy(targets={f"net.{path}": options for path, options in MOMENTUM.items()})
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=1, enable_model_summary=False, **silent
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    assert module.losses == pytest.approx(plain_losses(), abs=1e-5)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    made = swapped()
    made, optimizer = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=RATE))
    found = []
    for batch in batches():
        loss = made(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == pytest.approx(plain_losses(), abs=1e-5)


@pytest.mark.parametrize("loss", ["nll", "chunked_nll"])
def test_sft_trainer(tmp_path: Path, loss: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class Ordered(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in examples()])
    options = arguments(
        tmp_path, trl.SFTConfig, gradient_checkpointing=False, loss_type=loss, bf16=False, pad_token="<0>"
    )
    callback = revlib.ReversibleTrainerCallback(MOMENTUM)
    trainer = Ordered(model(), options, train_dataset=rows, processing_class=tokenizer(), callbacks=[callback])
    trainer.train()
    assert losses_of(trainer) == pytest.approx(plain_losses(), abs=1e-5)


def tokenizer() -> Any:
    """One word for each number, as there is no text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"<{n}>": n for n in range(97)}, unk_token="<0>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<0>", eos_token="<1>", unk_token="<0>"
    )


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    found = []
    for treatments in (None, ["store", "store"]):
        torch.manual_seed(5)
        made = peft.get_peft_model(copy.deepcopy(model()), config)
        path, options = next(iter(MOMENTUM.items()))
        targets = {f"*.{path}": {**options, "treatments": treatments}}
        callback = revlib.ReversibleTrainerCallback(targets, chunked_loss=treatments is None)
        trainer = InOrder(made, arguments(tmp_path), train_dataset=examples(), callbacks=[callback])
        trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][0] != pytest.approx(found[0][-1], abs=1e-5)


def test_bad_input_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    callback = revlib.ReversibleTrainerCallback(MOMENTUM)
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True would run the layers .* a second time"):
        InOrder(model(), arguments(tmp_path, gradient_checkpointing=True), callbacks=[callback])
    with pytest.raises(ValueError, match=r"model\.lay"):
        InOrder(model(), arguments(tmp_path), callbacks=[revlib.ReversibleTrainerCallback({"model.lay": None})])
    with pytest.raises(TypeError, match=r"targets='model\.layers': pass a mapping"):
        revlib.ReversibleTrainerCallback("model.layers")
    with pytest.raises(ValueError, match="every_n_steps=-1: pass n to measure each n-th step"):
        revlib.ReversibleTrainerCallback(every_n_steps=-1)
