"""What the methods with a prefix share: are the settings right, its tensors at their start, how many, and attaching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import DEFAULT, Attachment, added_key
from pefttutor.parts.cached_attention import Form, form_of
from pefttutor.parts.network import Itself, Maker, Network
from pefttutor.parts.prefixes import prefixed
from pefttutor.parts.settings import check_whole
from pefttutor.parts.streams import token_table

__all__ = ["KEY", "add_prefix", "check_prefix", "count_prefix"]

KEY = "prefix"


def check_prefix(method: Any, *, least: int = 1) -> None:
    """Raise ValueError unless the fields that these methods share make sense. least: of virtual tokens."""
    check_whole(method, "num_virtual_tokens", least=least)
    if method.encoder_hidden_size is not None:
        check_whole(method, "encoder_hidden_size")
    check_whole(method, "init_seed", least=0)


def add_prefix(
    new: Attachment,
    model: nn.Module,
    before: str,
    start: Callable[[Form], Tensor | None] = lambda form: None,
    gates: Mapping[int, Callable[[], Tensor]] | None = None,
) -> Form:
    """Take in a prefix by the settings of the attachment's method, and return the form of the model's attention.

    before: how a refusal begins (`form_of`). start: what the prefix begins as, where it isn't drawn. gates: see
    `parts.prefixes`.

    Raises: ValueError as `form_of`.
    """
    method, key = new.method, added_key(KEY, new.name)
    form, table = form_of(model, before), token_table(model, before)
    network = _network(method, form, table.shape[1], new.name)
    make: Itself | Network = network
    tensors = network.drawn(table)
    if not method.prefix_projection:
        make, tensors = Itself(key), {key: _drawn(method, form, table)}
    if (begins := start(form)) is not None:
        tensors = {key: begins}
    for part in prefixed(model, form, method.num_virtual_tokens, Maker(make), tensors, note=key, gates=gates):
        new.add(part)
    return form


def count_prefix(model: nn.Module, method: Any, before: str) -> int:
    """How many values the prefix has, or its table and MLP."""
    form, width = form_of(model, before), token_table(model, before).shape[1]
    if method.prefix_projection:
        return _network(method, form, width, DEFAULT).count()
    return method.num_virtual_tokens * form.width


def _network(method: Any, form: Form, width: int, name: str) -> Network:
    return Network(
        key=KEY,
        name=name,
        kind="mlp",
        rows=method.num_virtual_tokens,
        width=width,
        hidden=method.encoder_hidden_size or width,
        out=form.width,
        init_seed=method.init_seed,
    )


def _drawn(method: Any, form: Form, table: Tensor) -> nn.Parameter:
    generator = torch.Generator().manual_seed(method.init_seed)
    drawn = torch.randn(method.num_virtual_tokens, form.width, generator=generator)
    return nn.Parameter(drawn.to(table.device, torch.promote_types(table.dtype, torch.float32)))
