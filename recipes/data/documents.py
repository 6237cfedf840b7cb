"""Texts for pretrained language models: read from JSON lines, and packed into one row of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_revlib.pretrained.load import load_tokenizer


def tokenize(documents: Sequence[str], tokenizer: str) -> Tensor:
    """Return the tokens of all documents in one row of int32, with the end-of-text token between two documents.

    `tokenizer` names a pretrained model. Raises ValueError if its tokenizer cannot be loaded, or has no such token.
    """
    loaded = load_tokenizer(tokenizer)
    if len(documents) > 1 and loaded.eos_token_id is None:
        raise ValueError(
            f"tokenizer={tokenizer!r} has no end-of-text token to stand between {len(documents)} documents: set its"
            " eos_token and save it again"
        )
    ids: list[int] = []
    for row in loaded(list(documents), add_special_tokens=False, verbose=False).input_ids:
        ids += row if not ids else [loaded.eos_token_id, *row]
    return torch.tensor(ids, dtype=torch.int32)


def read_json_lines(text: str, key: str, path: str) -> list[str]:
    """Return the text under `key` of each line; ValueError for a line of `path` that has none."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data.path={path}: line {number} is not JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            keys = f"it has {', '.join(map(str, entry))}" if isinstance(entry, dict) else "it is no object"
            raise ValueError(f"data.key={key}: line {number} of {path} has no text under this key; {keys}")
        found.append(entry[key])
    return found
