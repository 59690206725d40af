"""Which modules HF PEFT means by names, and the modules that train fully: under its names and under ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from pefttutor.method import Attachment
from pefttutor.parts.freezing import added_by_others, fully_trained
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.modules import find_modules
from pefttutor.parts.part import owners_of_each

__all__ = [
    "HEADS",
    "check_places",
    "module_at",
    "modules_in",
    "modules_out",
    "names_for",
    "names_of_both",
    "task_of",
]

# Of a model's task by its class; and the heads that HF PEFT trains and saves for a task, whatever it is told.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_of(model: nn.Module) -> str | None:
    """HF PEFT's word for what the model is for; None where it has none.

    Its classes for tasks call the model with ids, and take conditional generation for that of an encoder-decoder: what
    hears or sees has no task.

    >>> task_of(nn.Linear(2, 2)) is None
    True
    """
    known: Any = model
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    if type(model).__name__.endswith("ForConditionalGeneration") and not known.config.is_encoder_decoder:
        return None
    return next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)


def names_for(model: nn.Module, paths: Collection[str]) -> list[str] | str:
    """`target_modules` that mean exactly these, in HF PEFT as here: last parts of names, whole names, or a pattern.

    >>> model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(2, 2)}), "up": nn.Linear(2, 2)})
    >>> names_for(model, ["a.up", "up"]), names_for(model, ["a.up"]), names_for(model, ["up"])
    (['up'], ['a.up'], 'up')
    """
    return names_of_both(model, paths)[0]


def names_of_both(
    model: nn.Module, paths: Collection[str], some: Collection[str] = ()
) -> tuple[list[str] | str, list[str] | str]:
    """`names_for` the modules, and in the same form for `some` of them."""
    every = [name for name, _ in model.named_modules() if name]

    def meant(names: Collection[str], among: Collection[str], dot: str) -> set[str]:
        return {path for path in among if path in names or path.endswith(tuple(dot + name for name in names))}

    for form in (lambda path: path.rpartition(".")[2], lambda path: path):
        names, less = sorted({form(path) for path in paths}), sorted({form(path) for path in some})
        # (IA)³'s feed-forward modules are those of the targets that end in a name, with a dot before it or without.
        if meant(names, every, ".") == set(paths) and meant(less, paths, "") == set(some):
            return names, less
    return tuple("|".join(map(re.escape, sorted(chosen))) for chosen in (paths, some))  # type: ignore[return-value]


def module_at(model: nn.Module, path: str, key: str) -> nn.Module:
    """The module of this name. Raises: ValueError, with the file's key, if the model has none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"the file has {key!r}, and this model has no {path!r}: it was trained on another base model, or on "
            "another part of it (such as a bare model without its head)."
        ) from None


def check_places(model: nn.Module, attachment: Attachment) -> None:
    """Raise ValueError for a layer that stands at several places: HF PEFT changes one of them."""
    layers = {id(part.layer) for part in attachment.parts if isinstance(part, LayerChange)}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in layers and first.setdefault(id(module), path) != path:
            raise ValueError(
                f"{path!r} and {first[id(module)]!r} are one layer, and HF PEFT changes what the model does at one of "
                "the two places, here it changes at both: make it two layers, or use pefttutor.save and load."
            )


# ---- modules that train fully


def modules_out(model: nn.Module, names: Collection[str]) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the modules as HF PEFT takes them for exactly these, and what they hold, by its names.

    A weight that is tied to that of another module is written for that one too.

    Raises: ValueError where HF PEFT would take others for them as well.
    """
    if not names:
        return [], {}
    paths = list(find_modules(model, names, field="modules_to_save"))
    ours = added_by_others(model)
    inside = [p for path in paths for p in model.get_submodule(path).parameters() if id(p) not in ours]
    holders = {id(module) for each in owners_of_each(model, inside).values() for module, _ in each}
    for path, module in model.named_modules(
        remove_duplicate=False
    ):  # HF PEFT replaces a module at one place only
        if id(module) in holders and not any(f"{path}.".startswith(f"{other}.") for other in paths):
            paths.append(path)
    _check_meant(model, paths)
    persistent = model.state_dict(keep_vars=True)
    return paths, {
        key: tensor.detach()
        for key, tensor in persistent.items()
        if id(tensor) not in ours and any(key.startswith(f"{path}.") for path in paths)
    }


def _check_meant(model: nn.Module, paths: list[str]) -> None:
    others = [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if name.endswith(tuple(paths)) and not any(f"{name}.".startswith(f"{path}.") for path in paths)
    ]
    if others:
        raise ValueError(
            f"modules_to_save: HF PEFT takes every module whose name ends in one of {paths} for one that is meant, and "
            f"so {others[0]!r} too; rename a module, or train both."
        )


def modules_in(
    model: nn.Module, names: Any, tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], dict[str, Tensor], set[str]]:
    """Our `modules_to_save` for HF PEFT's, their tensors under our names, and which keys of the file these were.

    A head that HF PEFT names for every model of a task is left out where the model has none of that name.

    Raises: ValueError for other names that find nothing, modules that the file lacks, and weights that HF PEFT has
        untied from those of other modules.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    usual = {head for heads in HEADS.values() for head in heads}
    every = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    paths: list[str] = []
    for name in dict.fromkeys(names):
        found = [path for path in every if path.endswith(str(name))]
        if not found and name not in usual:
            raise ValueError(
                f"adapter_config.json has modules_to_save {name!r}, and this model has none such."
            )
        paths += [path for path in found if path not in paths]
    if not paths:
        return (), {}, set()
    own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())}
    parameters, buffers = fully_trained(model, paths)
    names_by_id = {id(own[name]): name for name in (*parameters, *buffers)}
    read: dict[str, Tensor] = {}
    used = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in names_by_id:
            continue
        name, inside = names_by_id[id(tensor)], any(key.startswith(f"{path}.") for path in paths)
        # Trained together there, too (ensure_weight_tying), both are in the file, and the same.
        apart = not read.get(name, tensors[key]).equal(tensors[key]) if key in tensors else not inside
        if apart:
            raise ValueError(
                f"{key!r} is tied to another of {names} in this model, and HF PEFT has trained one without the other. "
                "Untie them first: give the head a weight of its own, and set model.config.tie_word_embeddings = False."
            )
        if key in tensors:
            read[name] = tensors[key]
            used.add(key)
    return tuple(paths), read, used
