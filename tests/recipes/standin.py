"""Write small data of the right shape in the formats of the published ones."""

from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(0)


def idx(folder, train=40, test=20, size=28, compressed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = RANDOM.integers(0, 256, (count, size, size), dtype=np.uint8)
        for name, numbers in (("images-idx3", images), ("labels-idx1", _labels(count, 10))):
            header = bytes([0, 0, 8, numbers.ndim]) + b"".join(n.to_bytes(4, "big") for n in numbers.shape)
            file = folder / f"{prefix}-{name}-ubyte"
            if compressed:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(header + numbers.tobytes()))
            else:
                file.write_bytes(header + numbers.tobytes())
    return folder


def cifar(folder, classes=10, binary=False, each=1):
    """Write `each` images of each class into each file."""
    folder.mkdir(parents=True, exist_ok=True)
    few = {10: [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], 100: ["train", "test"]}[classes]
    for name in few:
        count = each * classes * (3 if name == "train" else 1)
        images, labels = RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8), _labels(count, classes)
        if binary:
            coarse = [] if classes == 10 else [labels[:, None] // 5]
            (folder / f"{name}.bin").write_bytes(np.hstack([*coarse, labels[:, None], images]).tobytes())
        else:
            key = b"labels" if classes == 10 else b"fine_labels"
            with (folder / name).open("wb") as file:
                pickle.dump({b"data": images, key: labels.tolist()}, file, protocol=2)
    return folder


def images(folder, parts=("train", "val"), classes=2, each=8, size=(60, 40)):
    for part in parts:
        for label in range(classes):
            (folder / part / f"n{label:02}").mkdir(parents=True, exist_ok=True)
            for i in range(each):
                pixels = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"n{label:02}" / f"{i}.png")
    return folder


def _labels(count, classes):
    return (np.arange(count) % classes).astype(np.uint8)


def large(folder, size):
    """Write a file of `size` bytes that takes no space on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "file").open("wb") as file:
        file.truncate(size)
    return folder / "file"


def arrays(folder, size):
    """Write images in the arrays that `ImageNet64` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        np.save(folder / f"{part}.npy", RANDOM.integers(0, 256, (8, size, size, 3), dtype=np.uint8))
    return folder


def language_model(folder, positions=128):
    """Save a small Llama and its tokenizer as `save_pretrained` does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {character: i for i, character in enumerate(["<end>", *sorted(bytewise.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocab), max_position_embeddings=positions, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def json_lines(folder, count=40):
    """Write documents, one in each line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"Document {i} of {count} says: {'over and over ' * (i % 7)}."}) for i in range(count)]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder / "documents.jsonl"
