"""Fine-tuning a pretrained language model from the command line, and its losses beside a plain loop's."""

from __future__ import annotations

import csv
import json
from functools import partial

import lightning as L
import pytest
import torch

import lightning_revlib as revlib
from lightning_revlib.cli.main import main
from lightning_revlib.recipes.data.text import TextFile
from lightning_revlib.recipes.models.finetune import NEARLY_PRETRAINED, FineTuneModule, longest_list
from tests.recipes import standin

pytest.importorskip("transformers")

SHORT = ["recipe=finetune", "data=text_file", "data.length=16", "data.batch_size=4", "logger=csv"]
SHORT += ["scheduler=warmup_rsqrt", "scheduler.warmup=1", "recipe.optimizer.lr=1e-2", "recipe.loss_chunk=24"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model and data."""
    folder = tmp_path_factory.mktemp("finetune")
    standin.language_model(folder / "model", positions=64)
    standin.json_lines(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Return the folder of a run of two epochs, with a checkpoint after each."""
    assert train(folder, "all", "trainer.max_epochs=2", *EACH) == 0
    return folder / "all"


EACH = ["callbacks=[default,resume]", "+callbacks.checkpoint.save_top_k=-1", "+trainer.limit_train_batches=2"]
EACH += ["callbacks.checkpoint.filename='after{epoch}'", "+callbacks.checkpoint.auto_insert_metric_name=false"]


def train(folder, run, *more):
    paths = [f"recipe.model={folder / 'model'}", f"data.path={folder / 'documents.jsonl'}"]
    return main(["train", *SHORT, *paths, f"hydra.run.dir={folder / run}", *more])


def logged(run):
    """Return the values of the run's table, by name."""
    with (run / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0]}


def held_out_loss(checkpoint, folder, *more):
    assert main(["eval", f"ckpt_path={checkpoint}", f"hydra.run.dir={folder}", *more]) == 0
    return logged(folder)["test/loss"]


def test_the_losses_are_a_plain_loops(folder, tmp_path):
    class Record(L.Callback):
        def __init__(self):
            self.batches, self.losses = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches.append(batch[0].clone())
            self.losses.append(outputs["loss"].item())

    name, record = str(folder / "model"), Record()
    module = FineTuneModule(name, partial(torch.optim.SGD, lr=0.1), loss_chunk=24)
    data = TextFile(str(folder / "documents.jsonl"), length=16, batch_size=4, tokenizer=name)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    strategy = revlib.ReversibleStrategy()
    L.Trainer(max_steps=4, accelerator="cpu", strategy=strategy, callbacks=[record], **silent).fit(module, data)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()
    revlib.swap(model, {"model.layers": {"coupling": NEARLY_PRETRAINED, "residual": True, "grid_bits": "auto"}})
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for ids in record.batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(losses) == 4 and record.losses == pytest.approx(losses, abs=1e-5)
    assert module.net.model.layers.drift == 0 and losses[0] - losses[-1] > 1e-3


def test_a_run_ends_with_the_originals_figures(folder, capsys):
    assert train(folder, "budget", "trainer.max_steps=1", "strategy.memory_budget=1MiB") == 0
    out = capsys.readouterr().out
    for row in ("held-out loss", "the original's loss", "by autograd", "memory plan", "last checkpoint", "0.0e+00"):
        assert row in out


def test_evaluation_computes_the_trained_function(folder, trained, tmp_path):
    checkpoints = [trained / f"checkpoints/after{epoch}.ckpt" for epoch in (0, 1)]
    first, last = (held_out_loss(each, tmp_path / each.stem) for each in checkpoints)
    assert logged(trained)["test/loss"] == pytest.approx(min(first, last), abs=1e-5) and first != last
    data = ["data=text_file", f"data.path={folder / 'documents.jsonl'}", "data.length=16", "data.batch_size=3"]
    options = ["strategy=reversible", *data, f"data.tokenizer={folder / 'model'}"]
    assert held_out_loss(checkpoints[1], tmp_path / "reversible", *options) == pytest.approx(last, abs=1e-5)


def test_the_original_trains_with_strategy_auto(folder, capsys):
    assert train(folder, "auto", "strategy=auto", "trainer.max_steps=1") == 0
    assert "ordinary autograd rebuilds nothing" in capsys.readouterr().out
    state = torch.load(folder / "auto/checkpoints/last.ckpt", weights_only=True)
    assert "reversible_targets" not in state


def test_resuming_ends_with_the_same_loss(folder, trained, recwarn):
    first = trained / "checkpoints/after0.ckpt"
    assert train(folder, "again", "trainer.max_epochs=2", *EACH, f"ckpt_path={first}") == 0
    whole, again = logged(trained), logged(folder / "again")
    assert again["test/loss"] == whole["test/loss"] and again["val/loss"][-1:] == whole["val/loss"][-1:]
    assert not [w for w in recwarn if "another function" in str(w.message)]


def test_a_checkpoint_knows_a_model_that_was_named_relative_to_a_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    short = ["trainer.max_steps=1", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]
    assert main(["train", *SHORT, "recipe.model=model", "data.path=documents.jsonl", *short, "hydra.run.dir=here"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["predict", f"ckpt_path={folder / 'here'}", "prompt=Document", "count=2"]) == 1  # of data, no model
    assert "data.path=documents.jsonl" in capsys.readouterr().err
    data = ["data=text_file", f"data.path={folder / 'documents.jsonl'}", f"data.tokenizer={folder / 'model'}"]
    predict = ["predict", f"ckpt_path={folder / 'here'}", "prompt=Document", "count=2", *data, "data.length=16"]
    assert main(predict) == 0
    (folder / "model").rename(tmp_path / "model")  # it has moved here
    try:
        with pytest.warns(UserWarning, match="model' is not there any more: model is taken"):
            assert main([*predict[:-2], f"data.tokenizer={tmp_path / 'model'}", "data.length=16"]) == 0
    finally:
        (tmp_path / "model").rename(folder / "model")


@pytest.mark.parametrize("prompt", ["Document", "null"])
def test_predict_writes_text(prompt, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = trained / "checkpoints/last.ckpt"
    options = [f"prompt={prompt}", "count=5", "temperature=0"]
    assert main(["predict", f"ckpt_path={checkpoint}", *options]) == 0
    out = capsys.readouterr().out
    assert "text written" in out and (prompt == "null" or "Document" in out)


def test_lora_saves_adapters_only(folder, tmp_path):
    pytest.importorskip("peft")
    assert train(folder, "lora", "recipe.lora.r=2", "recipe.lora.lora_dropout=0.1", "trainer.max_epochs=1") == 0
    checkpoint = folder / "lora/checkpoints/best.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    values = logged(folder / "lora")
    assert held_out_loss(checkpoint, tmp_path / "eval") == pytest.approx(values["test/loss"][-1:], abs=1e-5)
    assert set(values["drift/worst"]) == {0.0}
    assert train(folder, "more", "recipe.lora.r=2", "recipe.lora.lora_dropout=0.1", "trainer.max_epochs=2",
                 f"ckpt_path={folder / 'lora/checkpoints/last.ckpt'}") == 0  # fmt: skip


def test_documents_are_packed_with_the_end_of_text_between(tmp_path, folder):
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("one\u2028", "two") * 30))
    data = TextFile(str(tmp_path / "few.jsonl"), length=5, batch_size=1, tokenizer=str(folder / "model"), key="body")
    data.setup()
    row = data.parts["train"].data.tolist()
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder / "model").decode(row)
    assert text.startswith("one\u2028<end>two<end>one") and data.size == 60 * 3 + 30 * 3 + 59


def test_the_longest_list_is_found():
    inner = torch.nn.ModuleList(torch.nn.Identity() for _ in range(9))
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.ModuleList([inner]), inner]), "x": inner[:1]})
    assert longest_list(model) == "h"
    model["y"] = torch.nn.ModuleList([inner[0], inner[1]])
    with pytest.raises(ValueError, match="targets=None: ModuleDict has several lists of layers, h, y; name one"):
        longest_list(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.model=/none"], "model='/none': there is no such folder; pass one that save_pretrained wrote"),
        (["recipe.model=none.gguf"], "model='none.gguf': there is no such file, nor one in an installed package"),
        (["recipe.model={folder}"], "transformers cannot load it"),
        (["data.path=/none.txt"], "data.path=/none.txt does not exist"),
        (["data.key=body"], "data.key=body: line 1 of"),
        (["data.length=60", "data.path={folder}/short.txt"], "length=60: 5 % of 100 tokens are held out"),
        (["data.path={folder}/bad.jsonl"], "bad.jsonl: line 2 is not JSON"),
        (["data.path={folder}/latin.txt"], "latin.txt is no text in UTF-8"),
        (["data.length=65"], "data.length=65: {folder}/model has 64 positions"),
        (["data.tokenizer=null"], "data.tokenizer=None: the data are no tokens, and the model is {folder}/model"),
        (["data=digits"], "the data are no tokens"),
        (["recipe.targets=model.layer"], "targets=['model.layer']: target 'model.layer' matches no"),
        (["recipe.lora.r=2", "recipe.lora.target_modules=[query]"], "lora.target_modules=[down_proj]"),
        (["coupling.gamma=0.03"], "gamma=0.03"),
        (["recipe=reformer", "data.tokenizer={folder}/model"], "a Reformer reads bytes; leave the tokenizer out"),
    ],
)  # fmt: skip
def test_errors(overrides, message, folder, tmp_path, monkeypatch, capsys):
    if "recipe.lora.r=2" in overrides:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (folder / "short.txt").write_text("x" * 100)
    (folder / "bad.jsonl").write_text('{"text": "x"}\n{"text')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    keys = {o.partition("=")[0] for o in overrides}
    given = [f"recipe.model={folder / 'model'}", f"data.path={folder / 'documents.jsonl'}", "data.length=16"]
    given = [o for o in given if o.partition("=")[0] not in keys | ({"recipe.model"} if "recipe" in keys else set())]
    if "data" in keys:
        given = given[:1]
    groups = [] if "recipe" in keys else ["recipe=finetune"]
    groups += [] if "data" in keys else ["data=text_file"]
    assert main(["train", *groups, *given, *(o.format(folder=folder) for o in overrides), "logger=csv"]) == 1
    err = capsys.readouterr().err
    assert message.format(folder=folder) in err and "Traceback" not in err and err.count("\n") == 1
