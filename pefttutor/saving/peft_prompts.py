"""Virtual tokens and prefixes as HF PEFT writes them: one table, without what made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.data.trial import evaluating
from pefttutor.method import Attachment
from pefttutor.parts.cached_attention import form_of
from pefttutor.parts.network import Made
from pefttutor.parts.virtual_tokens import reading_body
from pefttutor.saving.peft_form import Found, Written
from pefttutor.saving.peft_modules import task_of
from pefttutor.saving.peft_options import check_options

__all__ = ["read_prefix", "read_prompt", "read_ptuning", "write_prefix", "write_tokens"]

TABLE = "prompt_embeddings"
SHAPE = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
ENCODER = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
INIT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
WHAT = "HF PEFT's virtual tokens stand before a text's"


@torch.no_grad()
def _table(attachment: Attachment) -> Tensor:
    """What is made at the moment, with an encoder or without. Shapes: → (P, width)."""
    made = next(part for part in attachment.parts if isinstance(part, Made))
    module, _ = next(iter(made.places.values()))
    with evaluating(module):
        return made.maker(module).clone()


def _check_task(model: nn.Module) -> None:
    task = task_of(model)
    if task is None:
        raise ValueError(
            f"HF PEFT puts no virtual tokens before a {type(model).__name__}'s text: it has to be a model for one of "
            "its tasks, such as …ForCausalLM. Use pefttutor.save and load."
        )
    if task == "SEQ_CLS" and not hasattr(model, "score"):  # a `score` reads a text's last token
        raise ValueError(
            f"a {type(model).__name__} classifies by a text's first token, and HF PEFT takes the first virtual one for "
            "that, so the two compute something else. Use pefttutor.save and load."
        )


def write_tokens(model: nn.Module, attachment: Attachment) -> Written:
    """The virtual tokens of PromptTuning, or those that PTuning's encoder makes."""
    table = _table(attachment)
    _check_task(model)
    if sum(part.lengthens() for part in attachment.parts) != len(table):
        raise ValueError(
            f"the virtual tokens of {attachment.name!r} stand in places of a text (placeholder_token_id), and HF PEFT "
            "knows them only before it. Use pefttutor.save and load."
        )
    options = {
        "num_virtual_tokens": len(table),
        "token_dim": table.shape[1],
        "num_transformer_submodules": 1,  # an encoder-decoder reads them in its encoder
        "num_attention_heads": 1,  # which HF PEFT asks a Mamba for, too, and uses for prefixes only
    }
    prompt = type(attachment.method).__name__ == "PromptTuning"
    return Written("PROMPT_TUNING" if prompt else "P_TUNING", options, {TABLE: table}, prompts=True)


def _read_tokens(
    model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor], kind: str, key: str
) -> Found:
    _check_task(model)
    _, path = reading_body(model, WHAT)
    return _found(config, tensors, kind, f"{path}.{key}")


def _found(config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, name: str) -> Found:
    """The table's rows, as many as the configuration says, under our name.

    For an encoder-decoder HF PEFT makes twice as many tokens, and puts the first half before the encoder's text.
    """
    tokens: Any = config.get("num_virtual_tokens")
    rows: dict[str, Tensor] = {}
    if TABLE in tensors:
        there = len(tensors[TABLE])
        if there != tokens * (config.get("num_transformer_submodules") or 1):
            raise ValueError(
                f"adapter_config.json has num_virtual_tokens = {tokens!r}, and {TABLE!r} of the file has {there} rows."
            )
        rows = {name.lstrip("."): tensors[TABLE][:tokens]}
    return Found(methods()[kind], {"num_virtual_tokens": tokens}, rows, {TABLE})


def read_prompt(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """Prompt tuning; how the rows had begun doesn't matter any more."""
    check_options(config, SHAPE | INIT)
    return _read_tokens(model, config, tensors, "PromptTuning", "prompt")


def read_ptuning(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """P-tuning, whose encoder HF PEFT doesn't save: the virtual tokens themselves go on training."""
    check_options(config, SHAPE | ENCODER)
    found = _read_tokens(model, config, tensors, "PTuning", "ptuning")
    return Found(found.kind, found.settings | {"encoder": "none"}, found.tensors, found.used)


def write_prefix(model: nn.Module, attachment: Attachment) -> Written:
    """Keys and values of a causal language model's layers, in turn, head by head."""
    _check_causal(model)
    table, (heads, width) = _table(attachment), form_of(model, WHAT).shape
    options = {
        "num_virtual_tokens": len(table),
        "token_dim": heads * width,
        "num_attention_heads": heads,
        "num_layers": table.shape[1] // (2 * heads * width),
        "num_transformer_submodules": 1,
    }
    return Written("PREFIX_TUNING", options, {TABLE: table}, prompts=True)


def read_prefix(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """Prefix tuning, whose MLP HF PEFT doesn't save: the prefix itself goes on training."""
    check_options(config, SHAPE | {"encoder_hidden_size", "prefix_projection", "init_weights"})
    _check_causal(model)
    path = form_of(model, WHAT).path
    return _found(config, tensors, "PrefixTuning", f"{path}.prefix")


def _check_causal(model: nn.Module) -> None:
    if task_of(model) != "CAUSAL_LM":
        raise ValueError(
            f"HF PEFT's prefixes are those of causal language models, and this is a {type(model).__name__}: of an "
            "encoder-decoder it gives two layers one prefix, and other models it refuses. Use pefttutor.save and load."
        )
