"""What an adapter_config.json may say: what is read, what has no effect, and what is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from pefttutor.saving.contents import listed

__all__ = ["check_complete", "check_options", "check_patterns", "keys_of"]

# Where it comes from, or what has an effect only beside an option that is refused.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
OFF: tuple[Any, ...] = (None, False, [], {}, "")
WAY_OUT = {
    "bias": "train biases by a BitFit of its own, beside the LoRA",
    "rank_pattern": "here all layers have one rank",
    "alpha_pattern": "here all layers have one alpha",
}


def check_options(config: dict[str, Any], read: Iterable[str], **neutral: Any) -> None:
    """Raise ValueError for an option that would change the model, and of which nothing is known here.

    read: the options that the caller reads. neutral: what else an option may be, or several values of it, that have
    no effect.
    """
    known = WITHOUT_EFFECT | set(read)
    for key, value in config.items():
        allowed = neutral.get(key, ())
        if key in known or any(value is off or (value == off and type(value) is type(off)) for off in OFF):
            continue
        if value not in (allowed if isinstance(allowed, (tuple, list)) else (allowed,)):
            way_out = WAY_OUT.get(
                key, "load it with HF PEFT, merge it into the weights there, and save that model"
            )
            raise ValueError(
                f"adapter_config.json has {key} = {value!r}, which can't be said here, so the model would compute "
                f"something else: {way_out}."
            )


def check_patterns(config: dict[str, Any], r: Any, alpha: Any) -> None:
    """Raise ValueError if layers have another rank or alpha than the method."""
    for key, usual in (("rank_pattern", r), ("alpha_pattern", alpha)):
        if any(value != usual for value in (config.get(key) or {}).values()):
            check_options({key: config[key]}, ())


def check_complete(model: nn.Module, config: dict[str, Any], paths: Collection[str]) -> None:
    """Raise ValueError if HF PEFT's names mean modules that the file has no tensors for.

    A pattern of the file is never run (a regular expression can be made to run for hours), and no choice of layers is
    made again: then the tensors alone say which modules are meant.
    """
    names, without = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(names, str) or isinstance(without, str) or config.get("layers_to_transform") is not None:
        return
    saved = config.get("modules_to_save") or ()
    saved = [saved] if isinstance(saved, str) else [str(name) for name in saved]

    def means(path: str, words: Any) -> bool:
        return any(path == str(word) or path.endswith(f".{word}") for word in words or ())

    inside = [path for path, _ in model.named_modules() if means(path, saved)]
    missing = [
        path
        for path, _ in model.named_modules()
        if means(path, names) and not means(path, without) and path not in paths
        if not any(f"{path}.".startswith(f"{other}.") for other in inside)
    ]
    if missing:
        raise ValueError(
            f"adapter_config.json has target_modules {sorted(map(str, names or ()))}, and the file lacks tensors for "
            f"{listed(missing)}: is it damaged, or of another base model?"
        )


def keys_of(tensors: Iterable[str], pattern: str) -> dict[str, re.Match[str]]:
    """The keys of the file that have this form, each with its match. The pattern is ours."""
    return {key: match for key in tensors if (match := re.fullmatch(pattern, key))}
