"""(IA)³ against HF PEFT with the same scales: outputs, every gradient, and merged weights."""

from __future__ import annotations

import contextlib
import copy
import json
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import IA3, detach, load, merge, save, trainable, unmerge
from pefttutor.saving.adapters import TENSORS
from tests.cases import KEYS_AND_FED, TEXTS, answer, batch_of, gradients, loss_of, moved
from tests.pictures import differences, picture
from tests.tiny import Quantised, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def method(kind: str, **more: object) -> IA3:
    targets, fed = KEYS_AND_FED[kind]
    return IA3(target_modules=targets, feedforward_modules=fed, **more)


def both(kind: str, heads: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module, dict[str, nn.Parameter]]:
    """A model with scales that aren't 1, the same by HF PEFT, and its parameters under our names."""
    from peft import IA3Config, get_peft_model

    targets, fed = KEYS_AND_FED[kind]
    ours = moved(method(kind, modules_to_save=heads).attach(tiny_model(kind, dtype=F64)))
    config = IA3Config(
        target_modules=list(targets), feedforward_modules=list(fed), fan_in_fan_out=kind == "gpt2",
        modules_to_save=list(heads) or None,
    )  # fmt: skip
    theirs = get_peft_model(tiny_model(kind, dtype=F64), config)
    parameters = {}
    for name, p in theirs.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        parameters[name.replace(".base_layer", "").replace(".default", "")] = p
    for name, p in ours.named_parameters():
        if p.requires_grad:
            parameters[name].data.copy_(p.data.view_as(parameters[name]))
    return ours, theirs, parameters


def assert_same(ours: nn.Module, theirs: nn.Module, parameters: dict[str, nn.Parameter], inputs) -> None:
    torch.testing.assert_close(answer(ours, inputs), answer(theirs, inputs), **EXACT)
    own, other = loss_of(ours, inputs), loss_of(theirs, inputs)
    torch.testing.assert_close(own, other, **EXACT)
    other.backward()
    expected = {name: p.grad for name, p in parameters.items() if p.requires_grad}
    found = gradients(ours, own)
    assert set(found) == set(expected) == set(trainable(ours))
    for name, grad in found.items():
        assert grad.abs().max() > 1e-8, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name].view_as(grad), **EXACT, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", TEXTS)
def test_outputs_and_every_gradient_are_those_of_peft(kind, side):
    assert_same(*both(kind), batch_of(kind, side, F64))


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("llama", "lm_head")])
def test_a_head_that_trains_fully_is_that_of_peft(kind, head):
    assert_same(*both(kind, (head,)), batch_of(kind, dtype=F64))


@pytest.mark.parametrize("kind", TEXTS)
def test_merged_weights_and_outputs_are_those_of_peft(kind):
    ours, theirs, parameters = both(kind)
    inputs = batch_of(kind, dtype=F64)
    expected, before = answer(ours, inputs), picture(ours)
    merge(ours)
    theirs.merge_adapter()
    torch.testing.assert_close(answer(ours, inputs), expected, **EXACT)
    own, changed = dict(ours.named_parameters()), 0
    base = dict(tiny_model(kind, dtype=F64).named_parameters())
    for name, p in parameters.items():
        torch.testing.assert_close(own[name].view_as(p), p, **EXACT, msg=name)
        changed += name in base and not torch.equal(own[name], base[name])
    # Keys and values have biases, which are scaled too; the inputs of a feed-forward layer don't reach its bias.
    assert changed == {"llama": 10, "gpt2": 6, "bert": 12, "t5": 16}[kind]
    unmerge(ours)
    assert differences(before, picture(ours)) == []


def test_it_is_the_plain_formula_on_the_output_and_on_the_input():
    model = nn.ModuleDict({"up": nn.Linear(4, 6, dtype=F64), "down": nn.Linear(6, 4, dtype=F64)})
    moved(IA3(target_modules=("up", "down"), feedforward_modules=("down",)).attach(model))
    x, h = torch.randn(3, 4, dtype=F64), torch.randn(3, 6, dtype=F64)
    up, down = model["up"], model["down"]
    torch.testing.assert_close(up(x), up.ia3_l * F.linear(x, up.weight, up.bias))
    torch.testing.assert_close(down(h), F.linear(down.ia3_l * h, down.weight, down.bias))
    assert (up.ia3_l.shape, down.ia3_l.shape) == ((6,), (6,))


def test_an_embeddings_output_can_be_scaled_and_its_input_of_tokens_can_not():
    table = nn.Embedding(7, 4, padding_idx=0)
    model = moved(IA3(target_modules=("0",), feedforward_modules=()).attach(nn.Sequential(table).eval()))
    ids = torch.tensor([[1, 0, 3]])
    expected = table.ia3_l * table.weight[ids]
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(merge(model)(ids), expected)
    other = nn.Sequential(nn.Embedding(7, 4))
    before = picture(other)
    with pytest.raises(ValueError, match=r"'0'.*Embedding"):
        IA3(target_modules=("0",), feedforward_modules=("0",)).attach(other)
    assert differences(before, picture(other)) == []


def test_the_count_of_t0_3b_is_the_published_one():
    """Liu et al. 2022: 540 K values for T0-3B: 24 blocks in each half, d 2,048 and 5,120 hidden features."""
    import transformers as hf

    config = hf.T5Config(
        d_model=2048, d_ff=5120, d_kv=64, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = hf.T5ForConditionalGeneration(config)
    count = 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120)
    assert method("t5").count(model) == count == 540_672


def test_scales_next_to_half_precision_weights_are_float32():
    model = method("llama").attach(tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert answer(model, batch_of("llama")).dtype == torch.bfloat16


@pytest.mark.parametrize("fed", [(), ("0",)], ids=["output", "input"])
def test_a_quantised_layer_is_scaled_around(fed):
    layer = Quantised(nn.Linear(6, 5))
    model = moved(IA3(target_modules=("0",), feedforward_modules=fed).attach(nn.Sequential(layer)))
    x, scale = torch.randn(3, 6), model[0].ia3_l
    expected = (
        F.linear(x * scale, layer.dense_weight(), layer.bias)
        if fed
        else scale * F.linear(x, layer.dense_weight(), layer.bias)
    )
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="quantised"):
        merge(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ("k_proj",)}, r"feedforward_modules: '.*down_proj' is none of target_modules"),
        ({"feedforward_modules": ("wrong",)}, "feedforward_modules: this model has no 'wrong'"),
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
        ({"target_modules": ("input_layernorm",), "feedforward_modules": ()}, "it is a LlamaRMSNorm, not"),
        ({"modules_to_save": ("k_proj",)}, "is a target and part of"),
    ],
)  # fmt: skip
def test_names_that_make_no_sense_are_refused_and_change_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        IA3(**fields).attach(model)
    assert differences(before, picture(model)) == []


def test_without_targets_it_says_so():
    with pytest.raises(ValueError, match="target_modules is empty"):
        IA3(target_modules=(), feedforward_modules=())


def test_one_expression_for_the_whole_name_can_mean_both(tmp_path):
    model = IA3(target_modules=r".*(k_proj|down_proj)", feedforward_modules=r".*down_proj").attach(
        tiny_model("llama")
    )
    moved(model)
    save(model, tmp_path)
    again = load(tiny_model("llama"), tmp_path)
    assert torch.equal(answer(again, batch_of("llama")), answer(model, batch_of("llama")))
    assert differences(picture_of_plain(again), picture_of_plain(model)) == []


def picture_of_plain(model: nn.Module) -> dict[str, object]:
    return {"names": list(detach(copy.deepcopy(model)).state_dict()), "trains": trainable(model)}


def test_an_expression_in_a_file_is_never_run(tmp_path):
    """This one would run for hours on a name of thirty letters; a file may come from anybody."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = nn.ModuleDict({"a" * 30: nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    save(IA3(target_modules=("b",), feedforward_modules=("b",)).attach(model), tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        about = json.loads(file.metadata()["pefttutor"])
    about["fields"]["feedforward_modules"] = "(a+)+b"
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, metadata={"pefttutor": json.dumps(about)})
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    with too_long_after(3):
        try:
            load(detach(model), tmp_path)
        except ValueError:
            return  # refused: as good


@contextlib.contextmanager
def too_long_after(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("the expression was run")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
