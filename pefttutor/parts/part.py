"""What a part of an attachment knows about itself: what trains, what is saved, how it is switched and taken out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["Part", "hold", "let_go", "of_kind"]

Kind = TypeVar("Kind")
Key = tuple[nn.Module, str]  # a tensor's place: the module that holds it, and what it calls it


def hold(module: nn.Module, key: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Let the module hold the tensor under this key: a parameter trains, any other tensor is a buffer.

    persistent: whether a buffer belongs to the module's state_dict; a checkpoint of `fit` has all.
    """
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(key, tensor)
    else:
        module.register_buffer(key, tensor, persistent=persistent)


def let_go(module: nn.Module, key: str) -> None:
    """Take back what `hold` has done."""
    module._parameters.pop(key, None)
    module._buffers.pop(key, None)
    module._non_persistent_buffers_set.discard(key)


class Part:
    """What an attachment has put into a model at one or several places. The defaults are those of a part that adds
    parameters, changes nothing in place and can't be folded into the weights.

    Every function is asked by one room: `trained` and `after_step` by training, `saved` and `loaded` by saving,
    `switch`, `fold`, `unfold` and `remove` by `pefttutor.method`, `trace` by memory.
    """

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        raise NotImplementedError

    def saved(self) -> list[tuple[str, Tensor]]:
        """What has to be saved, each with a name for messages: what trains, and buffers."""
        raise NotImplementedError

    def added(self) -> list[Tensor]:
        """The parameters and buffers that this part has put beside the base's own."""
        return [tensor for _, tensor in self.saved()]

    def kept_aside(self) -> list[Tensor]:
        """Tensors that belong to this part and lie nowhere in the model."""
        return []

    def switch(self, on: bool) -> None:
        """Take effect from now on, or don't: then the model computes as if this part had never been put in."""
        raise NotImplementedError

    def in_turn(self) -> None:
        """Act after what was attached before: all parts that take effect are asked, in the order of attaching."""

    def remove(self) -> None:
        """Take out of the model all that was put in. The part is switched off already."""
        raise NotImplementedError

    def named_in_place(self) -> list[tuple[str, Tensor]]:
        """The base's own tensors that training changes in place, each with a name for messages."""
        return []

    def changed_in_place(self) -> list[Tensor]:
        """The base's own tensors that training changes in place."""
        return [tensor for _, tensor in self.named_in_place()]

    def touched(self) -> list[Tensor]:
        """The base's own tensors that folding writes, or that the part computes others from."""
        return self.changed_in_place()

    # Whether it takes effect although nothing of it trains.
    acts_alone = False

    # Whether training puts some of it back to its start, so that what stands there may well have moved.
    restarts = False

    # Whether another additive part may be folded into the same tensors independently of this one.
    additive = False

    def check_foldable(self) -> None:
        """Raise ValueError, with the reason, if this part can't be folded into the weights."""
        raise ValueError(
            "it changes what the model computes in a way that no weight can hold; leave it attached."
        )

    def fold(self) -> None:
        """Let the weights hold the change, so that it costs nothing, in a way that `unfold` can take back exactly."""
        self.check_foldable()

    def unfold(self) -> None:
        """Put the base's weights back, bit for bit."""

    def keep(self, model: nn.Module) -> None:
        """The part is folded: let the change be the base's own from now on, and stay when the part is removed."""

    def after_step(self) -> None:
        """The optimizer has changed what trains."""

    def loaded(self) -> None:
        """Saved values have been copied into what `saved` names."""

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What `layer` keeps for its backward pass, where this part has changed it; None for any other layer.

        `x` is what goes in and `tape` notes what is kept (`pefttutor.memory.tape`); returned is what comes out.
        """
        return None

    def trace_into(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What goes into `layer` where x would, if this part changes that and leaves the layer as it is."""
        return x

    def lengthens(self) -> int:
        """By how many virtual tokens this part makes a text longer inside of the model."""
        return 0

    def precedes(self) -> int:
        """How many keys and values this part puts before those of a text in every layer."""
        return 0

    def covers(self, module: nn.Module) -> bool:
        """Whether this part has changed what `module` computes."""
        return False

    def shades(self, module: nn.Module) -> bool:
        """Whether `module` sees a weight through this part: made anew at each call, or for a gradient of its own."""
        return False


def of_kind(parts: Iterable[Part], kind: type[Kind]) -> list[Kind]:
    """Those of an attachment's parts that are of this kind, in their order."""
    return [part for part in parts if isinstance(part, kind)]


def owners(model: nn.Module, parameter: Tensor) -> list[Key]:
    """Every module that holds the parameter, and what it calls it: more than one where weights are tied."""
    return owners_of_each(model, [parameter])[id(parameter)]


def owners_of_each(model: nn.Module, parameters: Iterable[Tensor]) -> dict[int, list[Key]]:
    """The `owners` of several parameters, by the parameter's id: the model is walked once."""
    found: dict[int, list[Key]] = {id(p): [] for p in parameters}
    for module in model.modules():
        for key, p in module._parameters.items():
            if id(p) in found:
                found[id(p)].append((module, key))
    return found


def names_of(model: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """The names of parameters in the model, in the order given."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(t)] for t in tensors]
