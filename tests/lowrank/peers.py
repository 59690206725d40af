"""A method beside HF PEFT's: the same model and the same weights under our names, outputs and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor import trainable

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def lora_config(ours: Any, **own: Any) -> Any:
    """HF PEFT's configuration of the same settings."""
    from peft import LoraConfig

    return LoraConfig(
        r=ours.r, lora_alpha=ours.lora_alpha, target_modules=list(ours.target_modules),
        lora_dropout=ours.lora_dropout, use_rslora=getattr(ours, "use_rslora", False),
        modules_to_save=list(ours.modules_to_save) or None, **own,
    )  # fmt: skip


def with_peft(model: nn.Module, config: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy of the model adapted by HF PEFT, and its parameters under our names."""
    from peft import get_peft_model

    theirs = get_peft_model(copy.deepcopy(model), config)
    names = {}
    for name, parameter in theirs.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        name = name.replace("lora_embedding_", "lora_").replace(".base_layer", "")
        names[name.replace(".default.weight", "").replace(".default", "")] = parameter
    return theirs, names


def drawn(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """The model moved from its start in all that trains: at the start half the errors don't show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def run(model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 3) -> dict[str, Any]:
    """Logits, loss, and the gradient that arrives at the input embeddings; leaves the others in `.grad`."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        output.retain_grad()
        seen.append(output)

    handle = model.get_input_embeddings().register_forward_hook(keep)
    torch.manual_seed(seed)  # of dropout
    result = model(**inputs)
    handle.remove()
    result.loss.backward()
    inner = [output.grad for output in seen]
    return {"logits": result.logits.detach(), "loss": result.loss.detach(), "inner": inner}


def assert_same_as_peft(
    model: nn.Module,
    ours: Any,
    config: Any,
    inputs: Mapping[str, Tensor],
    *,
    train: bool = False,
    prepare: Callable[[Any], None] = lambda theirs: None,
    theirs_on: nn.Module | None = None,
    called: Mapping[str, str] | None = None,
    **within: float,
) -> None:
    """Outputs and every gradient, with the weights copied. train: in training mode, with the same random draws.
    prepare: what has still to be done to the other library's model. theirs_on: the base that it gets, if another.
    called: what we call its tensors, by the ends of their names there."""
    adapted = drawn(ours.attach(copy.deepcopy(model))).train(train)
    theirs, their_parameters = with_peft(theirs_on or model, config)
    for ending, ours_for_it in (called or {}).items():
        their_parameters = {n.replace(ending, ours_for_it): p for n, p in their_parameters.items()}
    prepare(theirs.train(train))
    own = dict(adapted.named_parameters())
    trains = set(trainable(adapted))
    assert trains == {n for n, p in their_parameters.items() if p.requires_grad}
    assert sum(trainable(adapted).values()) == ours.count(model)
    for name in trains:
        their_parameters[name].data.copy_(own[name].data)
    within = within or EXACT
    torch.testing.assert_close(run(adapted, inputs), run(theirs, inputs), **within)
    for name in trains:
        assert own[name].grad.abs().max() > 1e-8, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(own[name].grad, their_parameters[name].grad, **within)
    assert all(p.grad is None for name, p in own.items() if name not in trains)


def without_the_small_number(theirs: Any) -> None:
    """HF PEFT's AdaLoRA divides lora_alpha by r + 0.00001, which it lets train, and has a penalty in its loss."""
    for name, parameter in theirs.named_parameters():
        if "ranknum" in name:
            parameter.data.sub_(1e-5)
            parameter.requires_grad_(False)
    theirs.peft_config["default"].orth_reg_weight = 0


def with_linear_layers(model: nn.Module) -> nn.Module:
    """A copy that has an `nn.Linear` where GPT-2 has a Conv1D: the same function, which HF PEFT's LyCORIS can adapt."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            n_in, n_out = layer.weight.shape
            linear = nn.Linear(n_in, n_out, dtype=layer.weight.dtype)
            linear.weight.data.copy_(layer.weight.t())
            linear.bias.data.copy_(layer.bias)
            model.set_submodule(path, linear)
    return model
