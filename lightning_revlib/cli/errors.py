"""Errors of a user on the command line: one message for each, with the way out."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CONFIG = "pkg://lightning_revlib.conf"
PLUGINS = {  # packages of Hydra's plugins, by the option that each adds
    "joblib": "hydra-joblib-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "optuna": "hydra-optuna-sweeper",
}


def is_user_error(error: Exception) -> bool:
    """Return whether an error is the user's; Lightning's own is known only if Lightning has been imported."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    others = () if lightning is None else (lightning.MisconfigurationException,)
    kinds = (ValueError, TypeError, OSError, InstantiationException, OmegaConfBaseException, *others)
    return isinstance(error, kinds) and not isinstance(error, BrokenPipeError)


def explain(error: Exception, command: str, overrides: Sequence[str] = ()) -> str:
    """Return one message for the user: the value that was given, and what can be given instead."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if message := _explain_override(error, overrides):
        return message
    cause = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        missing = _missing_key(error.full_key or "", command, overrides)
        return f"{missing} is needed: add {missing}=..."
    if isinstance(error, InstantiationException) and cause is not None:
        return _explain_argument(error, cause, command, overrides)
    if isinstance(cause, OmegaConfBaseException) and (key := cause.full_key) and "not in struct" in str(cause):
        parent, _, name = key.rpartition(".")
        if options := _options(key):
            return f"{key}: none is chosen; add {key}=..., one of {', '.join(options)}"
        keys = _keys(command, overrides, parent)
        where = f"{parent} has {', '.join(keys)}" if parent and keys else f"`revlib {command} --help` lists all"
        if others := _options_with(parent, name):
            have = "has" if len(others) == 1 else "have"
            return f"{key}: no such key; {where}; add {' or '.join(others)}, which {have} {name}"
        return f"{key}: no such key{suggest(name, keys, parent)}; {where}; +{key}=... adds a new one"
    if not isinstance(error, (TypeError, OSError)):
        text = str(error).strip()
        # A loader's process adds its traceback.
        return re.split(r"^[\w.]+(?:Error|Exception): ", text, flags=re.M)[-1] if text.startswith("Caught ") else text
    suspects = _suspects(command, overrides) if isinstance(error, TypeError) else []
    # the user's values may cause it, or the program
    return "; ".join([*suspects, str(error).strip()]) + " (HYDRA_FULL_ERROR=1 shows the traceback)"


def _explain_override(error: Exception, overrides: Sequence[str]) -> str:
    """Return the message about an override that Hydra cannot use, if it is one."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = error.options or _options(group)  # none are given for one of a list
        if option in PLUGINS:
            return f"{group}={option} is a plugin of Hydra's, which is not installed: pip install {PLUGINS[option]}"
        return f"{group}={option}: no such option{suggest(option, options)}; it has {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; write key=value or group=option, quoted if the shell needs it"
    if str(error).startswith("Config group override must be a string"):  # Hydra does not say of which
        for word in overrides:
            group, _, option = word.partition("=")
            if (options := _options(group)) and option not in options:
                without = f"; ~{group} leaves it out" if option == "null" and group in ("callbacks", "logger") else ""
                return f"{word}: no such option; it has {', '.join(options)}{without}"
    if str(error).startswith("Ambiguous value for argument"):
        given = str(error).split("'")[1]
        name, _, value = given.partition("=")
        return f"{given}: for one run after the other add -m; a list is written {name}=[{value}]"
    return ""


def _explain_argument(error: Exception, cause: BaseException, command: str, overrides: Sequence[str]) -> str:
    """Return the message of a class that refuses its arguments, with the keys that they may come from."""
    _, _, where = str(error).rpartition("full_key: ")  # torch's messages do not name the key
    if re.search(r"\w=", str(cause)) or not where:
        return _with_recipe_keys(str(cause), command, overrides)
    given = [word for word in overrides if word.lstrip("+").startswith(f"{where}.")]
    hints = _suspects(command, overrides) or ([f"see {', '.join(given)}"] if given else [])
    return "; ".join([f"{where}: {cause}", *hints])


def _with_recipe_keys(text: str, command: str, overrides: Sequence[str]) -> str:
    """Return a message with arguments of the recipe's class as they are written on the command line."""
    of_all = _keys(command, overrides, "")
    keys = [key for key in _keys(command, overrides, "recipe") if key not in of_all]
    return re.sub(rf"(?<![\w.])({'|'.join(keys)})=", r"recipe.\1=", text) if keys else text


def _missing_key(key: str, command: str, overrides: Sequence[str]) -> str:
    """Return the key whose value is missing, to which another may refer."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(_compose(command, overrides))
    while referred := re.match(r"\$\{(?:oc\.select:)?([\w.]+)", str(_value_at(values, key))):
        key = referred[1]
    return key


def _value_at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def check_flags(command: str, overrides: Sequence[str]) -> None:
    """Raise ValueError for a flag that is given as a text, which would count as true."""
    from omegaconf import OmegaConf

    texts = [word for word in overrides if word.partition("=")[2].lower() in ("yes", "no", "on", "off")]
    if not texts:
        return
    cfg = _compose(command, overrides)
    for word in texts:
        key = word.partition("=")[0].lstrip("+")
        if isinstance(OmegaConf.select(cfg, key, throw_on_missing=False), bool):
            raise ValueError(f"{word}: write {key}=true or {key}=false")


def _suspects(command: str, overrides: Sequence[str]) -> list[str]:
    """Return a question for each override whose value is of another type than the one in the configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    cfg = _compose(command, overrides)
    found = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value, usual = override.value(), OmegaConf.select(cfg, override.key_or_group, throw_on_missing=False)
        if _is_number(usual) and not _is_number(value):
            found.append(f"was {override.input_line} meant as a number, such as {str(usual).lower()}?")
        elif OmegaConf.is_list(usual) and not isinstance(value, list):
            found.append(f"was {override.input_line} meant as a list, such as {','.join(str(usual).split(', '))}?")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _keys(command: str, overrides: Sequence[str], parent: str) -> list[str]:
    """Return the keys below `parent` in the command's configuration, with the groups chosen as in `overrides`."""
    from omegaconf import DictConfig, OmegaConf

    cfg = _compose(command, overrides)
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return [*map(str, node), *([] if parent else ["experiment"])] if isinstance(node, DictConfig) else []


def _compose(command: str, overrides: Sequence[str]) -> Any:
    """Return the command's configuration, with the groups chosen as in `overrides`."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG.removeprefix("pkg://"), version_base="1.3"):
        groups = GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)
        chosen = [o for o in overrides if o.partition("=")[0] in groups]
        try:
            return compose(command, chosen)
        except HydraException:  # the options are in a folder of the user's own
            return compose(command)


def _options(group: str) -> list[str]:
    """Return the names of a group's options, none if there is no such group."""
    from lightning_revlib import conf

    return sorted(file.stem for file in (Path(conf.__file__).parent / group).glob("*.yaml")) if group else []


def _options_with(group: str, key: str) -> list[str]:
    """Return the options of a group whose file has the key, as they are written on the command line."""
    from omegaconf import OmegaConf

    from lightning_revlib import conf

    files = sorted((Path(conf.__file__).parent / group).glob("*.yaml")) if group else []
    options: dict[str, Any] = {file.stem: OmegaConf.load(file) for file in files}
    return [f"{group}={name}" for name, cfg in options.items() if key in cfg.get(group, cfg)]


def suggest(name: str, known: Iterable[str], parent: str = "") -> str:
    """Return a hint with the known name that is nearest to a wrong one, or an empty text."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {parent + '.' if parent else ''}{found[0]}?)" if found else ""
