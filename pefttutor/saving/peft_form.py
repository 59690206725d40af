"""What a method says for a file of HF PEFT's, and what such a file says of a method: the one form for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.method import Attachment

__all__ = ["SHARED", "Found", "Reader", "Writer", "Written"]

SHARED = ("vera_A", "vera_B")  # what HF PEFT holds once for all layers, beside the model


@dataclass(frozen=True)
class Written:
    """For the file. options: of adapter_config.json, besides those that every method has. tensors: by HF PEFT's keys.

    prompts: whether it is one of the methods that HF PEFT puts around the model: it has to know the model's task then.
    """

    peft_type: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    prompts: bool = False


@dataclass(frozen=True)
class Found:
    """In the file. kind and settings: the method's class and fields, but for `modules_to_save`. tensors: by our names.

    used: the keys of the file that these were. computed: the last parts of what `attach` makes by itself.
    """

    kind: Callable[..., Any]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    used: set[str]
    computed: tuple[str, ...] = ()


Writer = Callable[[nn.Module, Attachment], Written]
Reader = Callable[[nn.Module, dict[str, Any], Mapping[str, Tensor]], Found]
