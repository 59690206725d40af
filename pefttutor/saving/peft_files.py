"""Adapters in the form of HF PEFT's files, both ways, without that library.

A folder holds `adapter_config.json`, what the method is, and `adapter_model.safetensors`, what it has learned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pefttutor.method import DEFAULT, find
from pefttutor.parts.attachment import base_of
from pefttutor.parts.fingerprint import check_base
from pefttutor.saving.contents import filled, listed, savable
from pefttutor.saving.files import write_atomically
from pefttutor.saving.peft_adalora import read_adalora, write_adalora
from pefttutor.saving.peft_adaption import read_adaption, write_adaption
from pefttutor.saving.peft_form import SHARED, Found, Reader, Writer, Written
from pefttutor.saving.peft_lora import read_lora, write_lora
from pefttutor.saving.peft_modules import HEADS, check_places, modules_in, modules_out, task_of
from pefttutor.saving.peft_products import read_products, write_products
from pefttutor.saving.peft_prompts import read_prefix, read_prompt, read_ptuning, write_prefix, write_tokens
from pefttutor.saving.peft_vectors import read_ia3, read_norms, write_ia3, write_norms

__all__ = ["from_peft", "to_peft"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

WRITERS: dict[str, Writer] = {
    **dict.fromkeys(("LoRA", "LoRAFA", "LoRAPlus", "PiSSA", "MiLoRA", "DoRA"), write_lora),
    "AdaLoRA": write_adalora,
    **dict.fromkeys(("LoHa", "LoKr", "VeRA"), write_products),
    "IA3": write_ia3,
    "LayerNormTuning": write_norms,
    "LLaMAAdapter": write_adaption,
    "PromptTuning": write_tokens,
    "PTuning": write_tokens,
    "PrefixTuning": write_prefix,
}
READERS: dict[str, Reader] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    **dict.fromkeys(("LOHA", "LOKR", "VERA"), read_products),
    "IA3": read_ia3,
    "LN_TUNING": read_norms,
    "ADAPTION_PROMPT": read_adaption,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_ptuning,
    "PREFIX_TUNING": read_prefix,
}
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def to_peft(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """Write what the attachment called `name`, or the only one, has learned as HF PEFT does; return the folder.

    `PeftModel.from_pretrained(base, folder)` then computes what `model` does, on the base as it was published.

    >>> from tempfile import TemporaryDirectory; from pefttutor.lowrank import LoRA
    >>> model = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4)))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(path.name for path in to_peft(model, folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    LoRAFA and LoRAPlus become LoRAs, PiSSA and MiLoRA one of twice the rank; PTuning and PrefixTuning are written
    without what made their tokens. What only training knows of, such as a seed or LoRA+'s ratio, is left behind. The
    head of a classifier is written along with virtual tokens, since HF PEFT trains and saves it.

    Behind virtual tokens, HF PEFT takes padding on the left for words' places: it says the same of texts without.

    The file's header has some values of the base, by which `from_peft` knows it; HF PEFT doesn't look at them.

    Raises: ValueError for a method that HF PEFT doesn't have, or a form of one, with what to do; if there is no such
        attachment, several and no name, or one that trains nothing; RuntimeError if it is merged, or switched off.
        Nothing is written then.
    """
    attachment = savable(model, name)
    method, kind = attachment.method, type(attachment.method).__name__
    if kind not in WRITERS:
        raise ValueError(
            f"no {kind} is written for HF PEFT; there are {', '.join(WRITERS)}. pefttutor.as_lora(model, r=…) makes a "
            "LoRA of what has changed linear layers; pefttutor.save writes everything, for pefttutor.load."
        )
    check_places(model, attachment)
    written, task = WRITERS[kind](model, attachment), task_of(model)
    there = [f".{path}" for path, _ in model.named_modules()]
    heads = [head for head in HEADS.get(task or "", ()) if any(path.endswith(f".{head}") for path in there)]
    fully, whole = modules_out(model, method.modules_to_save)
    if not all(path in fully for path in heads):
        if written.prompts:
            fully, whole = modules_out(model, [*fully, *heads])
        else:
            task = None  # else it would look for the head in the file
    config = {
        "peft_type": written.peft_type,
        "task_type": task,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        **({"modules_to_save": fully} if fully else {}),  # not every one of its configurations knows the word
        **written.options,
    }
    base = base_of(model, without={*attachment.tensors(model), *whole})
    _write(Path(folder), config, _named(written, whole), base)
    return Path(folder)


def _named(written: Written, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors by HF PEFT's keys."""
    if written.prompts:
        return written.tensors | {f"base_model.{key}": tensor for key, tensor in whole.items()}
    every = {**written.tensors, **whole}.items()
    return {f"base_model.{'' if key in SHARED else 'model.'}{key}": tensor for key, tensor in every}


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], base: dict[str, Any]) -> None:
    on_cpu = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    content = to_bytes(on_cpu, metadata={"format": "pt", "pefttutor": json.dumps({"base": base})})
    text = json.dumps(config, indent=2, sort_keys=True)

    def new_tensors(path: Path) -> None:
        path.write_bytes(content)
        # They must not be read by an old configuration: between the two there is none. Both are written by now.
        (folder / CONFIG).unlink(missing_ok=True)

    def new_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")
        write_atomically(folder / TENSORS, new_tensors)

    write_atomically(folder / CONFIG, new_config)


def from_peft(model: nn.Module, folder: str | os.PathLike[str], *, name: str = DEFAULT) -> nn.Module:
    """Attach to the base `model` what HF PEFT's `save_pretrained` has written into `folder`, and return the model.

    It goes on training as it would there. name: what the attachment is called in this model.

    >>> from copy import deepcopy; from tempfile import TemporaryDirectory; from pefttutor.lowrank import LoRA
    >>> base = nn.Sequential(nn.Linear(6, 4))
    >>> model = LoRA(r=2, target_modules=("0",)).attach(deepcopy(base))
    >>> with TemporaryDirectory() as folder:
    ...     from_peft(base, to_peft(model, folder))[0].lora_A.equal(model[0].lora_A)
    True

    A file that HF PEFT has written says little of its base: names and shapes are compared, and the weights that it
    brings along. One of `to_peft` has some values of all of it.

    Raises: FileNotFoundError if a file isn't there; ValueError for a damaged file, another base, a method that isn't
        here, an option that can't be said here, or a name in use. The model is then as it was.
    """
    config, tensors, base = _read(Path(folder))
    path = Path(folder) / TENSORS
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(
            f"{path.with_name(CONFIG)} has peft_type {kind!r}; what can be read is {', '.join(READERS)}. "
            "Another method can be merged into the weights with HF PEFT, or converted to a LoRA there."
        )
    plain = _plain(tensors, "base_model." if kind in PROMPTS else "base_model.model.", path)
    try:
        found = READERS[kind](model, config, plain)
        modules, whole, used = modules_in(model, config.get("modules_to_save"), plain)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{path.with_name(CONFIG)} has settings that don't fit: {error!r}") from error
    _check_rest(model, {key: tensor for key, tensor in plain.items() if key not in found.used | used}, path)
    method = _method(found, modules, path)
    values = found.tensors | whole
    if base is not None:
        check_base(base_of(model, without=values), base)

    def attach() -> None:
        method.attach(model, name=name)
        check_places(model, find(model, name))

    filled(
        model,
        name,
        attach,
        lambda fresh: {k: t for k, t in fresh.items() if k.rpartition(".")[2] in found.computed} | values,
        path,
    )
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """The configuration, the tensors, and the base that the header describes, if it does. They may be anything."""
    for path in (folder / CONFIG, folder / TENSORS):
        if path.is_file():
            continue
        files = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
        there = "the folder doesn't exist" if files is None else f"the folder has {files or 'nothing'}"
        if PICKLE in (files or ()):
            there += (
                f"; {PICKLE} is a pickle, which can run any program when it is read, so it isn't: load it with HF "
                "PEFT, where you trust it, and save_pretrained writes safetensors"
            )
        raise FileNotFoundError(f"{path} doesn't exist: {there}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: it isn't JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is damaged: it isn't an object with options.")
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            header = (file.metadata() or {}).get("pefttutor")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged or not a safetensors file ({error}).") from error
    try:
        return config, tensors, dict(json.loads(header)["base"]) if header else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{folder / TENSORS} is damaged: its header doesn't say its base ({error!r})."
        ) from error


def _plain(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors by their names in the model."""
    beside = {"prompt_embeddings": "prompt_embeddings"} | {f"base_model.{key}": key for key in SHARED}
    foreign = [key for key in tensors if not key.startswith(prefix) and key not in beside]
    if foreign:
        raise ValueError(
            f"{path} has tensors that aren't HF PEFT's, whose names begin with {prefix!r}: {listed(foreign)}."
        )
    return {beside.get(key, key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}


def _check_rest(model: nn.Module, rest: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless what is left are weights of the base, which HF PEFT saves with a changed embedding."""
    own = model.state_dict()
    for key, tensor in rest.items():
        name = key.replace(".base_layer.", ".")
        if name not in own:
            raise ValueError(f"{path} has a tensor {key!r} that nothing is known of.")
        mine = own[name]
        if mine.shape != tensor.shape or not (mine.to(tensor).equal(tensor) or tensor.to(mine).equal(mine)):
            raise ValueError(
                f"{path} brings its own {name!r}, {tuple(tensor.shape)}, and this model has another one, "
                f"{tuple(mine.shape)}: was the vocabulary resized, or is it another base? Give the model these weights "
                "first."
            )


def _method(found: Found, modules: tuple[str, ...], path: Path) -> Any:
    if not found.tensors:
        raise ValueError(f"{path} has no tensors of its method.")
    try:
        return found.kind(**found.settings, modules_to_save=modules)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.with_name(CONFIG)} has settings that don't fit: {error}") from error
