"""(IA)³ and the tuning of norms as HF PEFT writes them: a vector for each layer, and whole norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Attachment
from pefttutor.parts.freezing import fully_trained
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.linear import sizes, transposed
from pefttutor.parts.norms import norm_parameters
from pefttutor.saving.contents import listed
from pefttutor.saving.peft_form import Found, Written
from pefttutor.saving.peft_modules import module_at, modules_in, names_for, names_of_both
from pefttutor.saving.peft_options import check_complete, check_options, keys_of

__all__ = ["read_ia3", "read_norms", "write_ia3", "write_norms"]

TARGETED = {"target_modules", "exclude_modules"}


def write_ia3(model: nn.Module, attachment: Attachment) -> Written:
    """The scales, as a column for an output and a row for an input."""
    parts: list[Any] = [part for part in attachment.parts if isinstance(part, LayerChange)]
    words = [part.path for part in parts if isinstance(part.layer, nn.Embedding)]
    if words:
        raise ValueError(
            f"HF PEFT's IA3 takes no embeddings, and {words[0]!r} is one: pefttutor.as_lora(model, r=…) makes a LoRA "
            "of the attachment, or leave the embedding out."
        )
    tensors = {f"{part.path}.ia3_l": part.scale.view((1, -1) if part.on_input else (-1, 1)) for part in parts}
    targets, fed = names_of_both(
        model, [part.path for part in parts], [part.path for part in parts if part.on_input]
    )
    options = {
        "target_modules": targets,
        "feedforward_modules": fed,
        "fan_in_fan_out": any(transposed(part.layer) for part in parts),
    }
    return Written("IA3", options, tensors)


def read_ia3(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """(IA)³; whether a scale is a row says which input it scales."""
    check_options(config, {*TARGETED, "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})
    keys = keys_of(tensors, r"(?P<path>.+)\.ia3_l")
    paths, fed = {match["path"]: key for key, match in keys.items()}, []
    for path, key in paths.items():
        layer, shape = module_at(model, path, key), tuple(tensors[key].shape)
        if shape not in ((1, sizes(layer)[0]), (sizes(layer)[1], 1)):
            raise ValueError(
                f"the file's {key!r} has the shape {shape}; the layer maps {sizes(layer)[0]} to {sizes(layer)[1]}."
            )
        if shape[0] == 1:
            fed.append(path)
    check_complete(model, config, paths)
    targets, less = names_of_both(model, list(paths), fed)
    found = {key: tensors[key].flatten() for key in paths.values()}
    return Found(
        methods()["IA3"], {"target_modules": targets, "feedforward_modules": less or ()}, found, set(keys)
    )


def write_norms(model: nn.Module, attachment: Attachment) -> Written:
    """γ and β of every norm that doesn't lie in a module that trains fully anyway."""
    fully, _ = fully_trained(model, attachment.method.modules_to_save)
    names = [name for name in norm_parameters(model) if name not in fully]
    tensors = {
        f"{path}.ln_tuning_layers.{key}": model.get_parameter(name).detach()
        for name in names
        for path, _, key in [name.rpartition(".")]
    }
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return Written("LN_TUNING", {"target_modules": names_for(model, list(paths))}, tensors)


def read_norms(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The tuning of all norms, which is what there is here."""
    check_options(config, TARGETED)
    keys = keys_of(tensors, r"(?P<path>.+)\.ln_tuning_layers\.(?P<x>\w+)")
    found = {f"{match['path']}.{match['x']}": tensors[key] for key, match in keys.items()}
    fully = modules_in(model, config.get("modules_to_save"), tensors)[1]
    expected = set(norm_parameters(model)) - set(fully)
    if set(found) != expected:
        other = sorted(set(found) ^ expected)
        raise ValueError(
            f"adapter_config.json has target_modules {config.get('target_modules')!r}; LayerNormTuning trains every "
            f"norm and nothing else, and {listed(other)} {'is' if len(other) == 1 else 'are'} in one of the two only."
        )
    return Found(methods()["LayerNormTuning"], {}, found, set(keys))
