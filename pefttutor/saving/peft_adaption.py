"""Prompts in attentions (LLaMA-Adapter) as HF PEFT writes them: of the upper layers, with one gate each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Attachment
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.linear import sizes
from pefttutor.saving.peft_form import Found, Written
from pefttutor.saving.peft_modules import module_at
from pefttutor.saving.peft_options import check_options, keys_of

__all__ = ["read_adaption", "write_adaption"]

ATTENTION = "self_attn"
TYPES = ("llama", "mistral")  # and gpt2, in which it leaves out the attention's last layer
KEEP = "Use pefttutor.save and load."


def write_adaption(model: nn.Module, attachment: Attachment) -> Written:
    """Prompts and gates; where HF PEFT would compute something else, that is said."""
    method, parts = attachment.method, [p for p in attachment.parts if isinstance(p, LayerChange)]
    if method.gate != "layer":
        raise ValueError(
            f"gate is {method.gate!r}, and HF PEFT has one number for all heads of a layer, without tanh. {KEEP}"
        )
    if method.modules_to_save:
        raise ValueError(
            f"modules_to_save is {method.modules_to_save}, and beside prompts HF PEFT trains nothing else. {KEEP}"
        )
    tensors: dict[str, Tensor] = {}
    for part in parts:
        path = part.path.rpartition(".")[0]
        _check_attention(model, path, model.get_submodule(path))
        prompt, gate = part.trained()
        tensors |= {f"{path}.adaption_prompt": prompt[None], f"{path}.adaption_gate": gate}
    options = {
        "adapter_len": method.adapter_len,
        "adapter_layers": len(parts),
        "target_modules": ATTENTION,
    }
    return Written("ADAPTION_PROMPT", options, tensors)


def read_adaption(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """Prompts (1, adapter_len, d) and gates (1), each in its attention."""
    check_options(config, {"adapter_len", "adapter_layers"}, target_modules=ATTENTION)
    keys, found = keys_of(tensors, r"(?P<path>.+)\.adaption_(?P<which>prompt|gate)"), {}
    for key, match in keys.items():
        _check_attention(model, match["path"], module_at(model, match["path"], key))
        tensor = tensors[key]
        if match["which"] == "prompt" and (tensor.dim() != 3 or len(tensor) != 1):
            raise ValueError(
                f"the file's {key!r} has the shape {tuple(tensor.shape)}, and prompts are (1, adapter_len, d)."
            )
        found[f"{match['path']}.o_proj.adaption_{match['which']}"] = (
            tensor[0] if tensor.dim() == 3 else tensor
        )
    settings = {"adapter_len": config.get("adapter_len"), "adapter_layers": config.get("adapter_layers")}
    return Found(methods()["LLaMAAdapter"], settings, found, set(keys))


def _check_attention(model: Any, path: str, attention: Any) -> None:
    """Raise ValueError for an attention in which HF PEFT computes something else, or nothing."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in TYPES or path.rpartition(".")[2] != ATTENTION:
        raise ValueError(
            f"HF PEFT's adaption prompts that mean the same as here are those of {' and '.join(TYPES)}, and this model "
            f"is of the type {kind!r}. {KEEP}"
        )
    if attention.o_proj.bias is not None:
        raise ValueError(
            f"{path}.o_proj has a bias, which HF PEFT adds a second time with the prompts, and here it is added once. "
            f"{KEEP}"
        )
    if sizes(attention.q_proj)[1] != sizes(attention.k_proj)[0]:
        raise ValueError(
            f"the heads of {path!r} are together {sizes(attention.q_proj)[1]} wide and the model "
            f"{sizes(attention.k_proj)[0]}, which HF PEFT takes for the same. {KEEP}"
        )
