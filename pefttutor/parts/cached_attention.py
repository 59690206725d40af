"""What a model's attention looks like to a cache of keys and values: which layers, which modules, which shapes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.parts.called import own_tokens
from pefttutor.parts.prefix_cache import empty, with_prefix
from pefttutor.parts.streams import CACHES, named_arguments, reader, token_table

__all__ = ["Form", "cache_key", "form_of", "recorded"]


@dataclass(frozen=True)
class Form:
    """Where a prefix goes: the module that reads the text, and of each layer its index in a cache, its attention (None
    for a model without values), and the shape (heads, head_dim) of keys and values, the same in all."""

    body: Any
    path: str
    layers: tuple[int, ...]
    attention: tuple[nn.Module, ...]
    shape: tuple[int, int]

    @property
    def width(self) -> int:
        """The values of one virtual token: its key and value in every layer."""
        heads, head_dim = self.shape
        return 2 * len(self.layers) * heads * head_dim


def form_of(model: Any, what: str) -> Form:
    """The form of a model whose attention takes a cache of keys and values; an encoder-decoder's decoder's.

    Raises: ValueError for a model that reads no tokens, or has no such attention, or layers of several shapes; `what`
        is how it begins.
    """
    token_table(model, what)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    body: Any = model.get_decoder() if both else reader(model)[0]
    path = next(name for name, module in model.named_modules() if module is body)
    key, tokens = cache_key(body), own_tokens(model)
    if key is None:
        raise ValueError(
            f"{what} keys and values, and a {type(body).__name__} takes no cache of these, so nothing can stand there. "
            "PromptTuning puts virtual tokens on its input."
        )
    if tokens is None:
        return Form(body, path, *_by_config(model))
    seen = recorded(model, body, tokens)
    shapes = {(x.shape[1], x.shape[3]) for _, *both in seen.values() for x in both}
    depth = _depth(empty(body.config))
    if len(shapes) != 1 or len(seen) != depth:
        raise ValueError(
            f"{what} keys and values, which are to be of one shape in every layer, and of the {depth} layers of a "
            f"{type(body).__name__} {len(seen)} give some to a cache, of the shapes (heads, head_dim) "
            f"{sorted(shapes)}. PromptTuning puts virtual tokens on its input."
        )
    attention = tuple(module for module, *_ in seen.values())
    return Form(body, path, tuple(seen), attention, next(iter(shapes)))


def _by_config(model: Any) -> tuple[tuple[int, ...], tuple[nn.Module, ...], tuple[int, int]]:
    """Layers and shape as a config says them, of a model without values, which can't be tried."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return tuple(range(layers)), (), (heads, own or config.hidden_size // config.num_attention_heads)


def cache_key(module: nn.Module) -> str | None:
    """What a module calls its cache; None if it takes none."""
    names = (*CACHES, "layer_past")
    return next((key for key in names if key in inspect.signature(module.forward).parameters), None)


def recorded(model: Any, body: Any, inputs: dict[str, Tensor]) -> dict[int, tuple[nn.Module, Tensor, Tensor]]:
    """What each layer's attention gives its cache in a trial, and which module that is, by the layer's index.

    A prefix that the model has already is seen by the words as in any call.
    """
    found: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
    running: list[nn.Module] = []

    def note(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found[index] = running[-1], keys, values
        return keys, values

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        cache = empty(body.config)
        shown = with_prefix(cache, list(range(_depth(cache))), 0, note, stores=False)
        return (), named_arguments(module, args, kwargs) | {cache_key(module): shown}

    handles = [body.register_forward_pre_hook(give, with_kwargs=True, prepend=True)]
    for module in body.modules():
        handles.append(module.register_forward_pre_hook(lambda module, args: running.append(module)))
        handles.append(module.register_forward_hook(lambda module, args, output: running.pop() and None))
    try:
        with trial(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _depth(cache: Any) -> int:
    return len(getattr(cache, "self_attention_cache", cache).layers)
