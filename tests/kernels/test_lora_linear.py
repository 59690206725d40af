"""The LoRA linear kernel: equal to its formula, to HF PEFT, in every dtype, and keeping no more than it says."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pefttutor.kernels.lora_linear import lora_linear, lora_linear_reference

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def draw(*lead, inputs=6, outputs=7, r=3, dtype=torch.float64, trained=("x", "lora_A", "lora_B"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (*lead, inputs), "weight": (outputs, inputs), "bias": (outputs,),
        "lora_A": (r, inputs), "lora_B": (outputs, r),
    }  # fmt: skip
    tensors = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in trained:
        tensors[name].requires_grad_()
    return tensors


def run(function, tensors, scaling=0.5, **changes):
    """Output and gradients of everything that asks for one, for one fixed incoming gradient."""
    tensors = tensors | changes
    y = function(*(tensors[name] for name in NAMES), scaling)
    wanted = {
        name: tensors[name] for name in NAMES if tensors[name] is not None and tensors[name].requires_grad
    }
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, list(wanted.values()), incoming)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "trained", [("x", "lora_A", "lora_B"), NAMES, ("weight",), ("lora_B", "bias"), ("x",)]
)
def test_gradients_are_the_numerical_ones(trained):
    tensors = draw(2, 3, trained=trained)
    assert torch.autograd.gradcheck(lora_linear, (*tensors.values(), 0.5))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)])
@pytest.mark.parametrize("trained", [("x", "lora_A", "lora_B"), NAMES, ("lora_A",), ("weight", "lora_A")])
def test_equals_the_formula_for_any_leading_dimensions(lead, trained):
    tensors = draw(*lead, trained=trained)
    assert_same(run(lora_linear, tensors), run(lora_linear_reference, tensors))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_whatever_lies_in_fresh_memory(dtype):
    """Products go into memory that isn't cleared: here it is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = run(lora_linear, draw(2, 3, dtype=dtype, trained=NAMES))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in found.values())


def test_no_bias():
    tensors = draw(4, trained=("x", "lora_A", "lora_B")) | {"bias": None}
    assert_same(run(lora_linear, tensors), run(lora_linear_reference, tensors))


@pytest.mark.parametrize("r", [1, 6])
def test_parameters_stay_as_they_are(r):
    """r = 1 is the case in which a transposed factor is the factor's own memory."""
    tensors = draw(4, r=r)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assert_same(run(lora_linear, tensors), run(lora_linear_reference, tensors))
    assert_same({name: tensor.detach() for name, tensor in tensors.items()}, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
)
def test_every_dtype_against_float64(dtype, tolerance):
    """Low precision is judged by the exact result, not by the reference's own rounding."""
    tensors = draw(2, 9, dtype=dtype, trained=NAMES)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    ours, wanted = run(lora_linear, tensors), run(lora_linear_reference, exact)
    for name in wanted:
        assert ours[name].dtype == dtype, name
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(ours[name].double() / scale, wanted[name] / scale, rtol=0, atol=tolerance)


def test_a_wider_adapter_gets_its_gradient_in_its_own_dtype():
    tensors = draw(5, dtype=torch.bfloat16)
    wide = {name: tensors[name].detach().float().requires_grad_() for name in ("lora_A", "lora_B")}
    result = run(lora_linear, tensors | wide)
    assert result["y"].dtype == result["x"].dtype == torch.bfloat16
    assert result["lora_A"].dtype == result["lora_B"].dtype == torch.float32
    assert_same(result, run(lora_linear_reference, tensors | wide), rtol=5e-2, atol=5e-2)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    tensors = draw(2, 5, dtype=torch.float32, trained=NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(lora_linear, tensors)
    exact = run(lora_linear_reference, tensors)
    assert ours["y"].dtype == torch.bfloat16
    for name in NAMES:
        assert ours[name].dtype == torch.float32, name
        scale = exact[name].abs().max()
        torch.testing.assert_close(ours[name] / scale, exact[name] / scale, rtol=0, atol=4e-2)


def test_non_contiguous_tensors_and_conv1d_layout():
    tensors = draw(4, 3)
    dense = run(lora_linear_reference, tensors)
    stored = tensors["weight"].t().contiguous()  # (in, out), as GPT-2's Conv1D has it
    x = tensors["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    lora_A = tensors["lora_A"].detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous()
    assert_same(run(lora_linear, tensors, weight=stored.t(), x=x, lora_A=lora_A), dense)


def test_checkpointing_gives_the_same_gradients():
    tensors = draw(4)

    def checkpointed(*arguments):
        return checkpoint(lora_linear, *arguments, use_reentrant=False)

    assert_same(run(checkpointed, tensors), run(lora_linear, tensors), rtol=0, atol=0)


def kept(tensors, function=lora_linear):
    """Storage → bytes of all that autograd keeps, without the parameters."""
    parameters = {
        tensors[name].untyped_storage().data_ptr() for name in NAMES[1:] if tensors[name] is not None
    }
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(*(tensors[name] for name in NAMES), 0.5)
    del result
    return found


def test_keeps_x_and_x_A_only():
    tensors = draw(5, inputs=16, outputs=24, r=2, dtype=torch.float32)
    found = kept(tensors)
    assert sorted(found.values()) == [5 * 2 * 4, 5 * 16 * 4]  # x Aᵀ (tokens, r), x (tokens, in)
    assert found[tensors["x"].untyped_storage().data_ptr()] == 5 * 16 * 4  # x itself, not a copy


@pytest.mark.parametrize(
    ("trained", "sizes"), [(("x", "lora_B"), [40]), (("x", "lora_A"), [320]), (("x",), [])]
)
def test_keeps_less_when_less_trains(trained, sizes):
    assert (
        sorted(kept(draw(5, inputs=16, outputs=24, r=2, dtype=torch.float32, trained=trained)).values())
        == sizes
    )


def operations(tensors):
    """Shapes of the factors of all matrix products in forward and backward."""
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
        run(lora_linear, tensors)
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # where the two factors are
    return [e.input_shapes[first[e.name] :][:2] for e in profiler.events() if e.name in first]


def test_the_first_layer_computes_no_gradient_of_its_input_and_nothing_is_as_large_as_the_weight():
    sizes = {"inputs": 16, "outputs": 24, "r": 2}
    inner = operations(draw(5, **sizes))
    first = operations(draw(5, **sizes, trained=("lora_A", "lora_B")))
    assert len(inner) == 8
    assert len(first) == len(inner) - 2  # not grad · W, not its low-rank part
    for left, right in inner:
        assert (left[0], right[1]) not in ((24, 16), (16, 24)), f"as large as W: {left} by {right}"


@pytest.mark.usefixtures("way")
def test_in_inference_mode():
    tensors = draw(20)
    with torch.inference_mode():
        torch.testing.assert_close(
            lora_linear(*tensors.values(), 0.5), lora_linear_reference(*tensors.values(), 0.5)
        )


def test_on_a_cpu_a_backward_pass_within_autocast_is_that_without():
    one, two = draw(20, dtype=torch.float32), draw(20, dtype=torch.float32)
    lora_linear(*one.values(), 0.5).square().sum().backward()
    y = lora_linear(*two.values(), 0.5).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    for name in ("x", "lora_A", "lora_B"):
        assert torch.equal(one[name].grad, two[name].grad)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bias", [True, False])
def test_equals_hf_peft(bias):
    peft = pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    tensors = draw(2, 5, dtype=torch.float32)
    linear = nn.Linear(6, 7, bias=bias)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for mine, theirs in (
            (tensors["lora_A"], A),
            (tensors["lora_B"], B),
            (tensors["weight"], linear.weight),
        ):
            theirs.copy_(mine)
        if bias:
            linear.bias.copy_(tensors["bias"])

    def peer(x, weight, bias, lora_A, lora_B, scaling):
        return layer(x)

    theirs = run(peer, tensors, lora_A=A, lora_B=B)
    assert_same(run(lora_linear, tensors, scaling=2.0, **({} if bias else {"bias": None})), theirs)


def test_a_step_on_the_meta_device_allocates_nothing():
    meta = {name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in draw(4, 5).items()}
    y = lora_linear(*meta.values(), 0.5)
    y.backward(torch.empty_like(y))
    assert y.shape == (4, 5, 7)
    assert meta["x"].grad.shape == meta["x"].shape


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \(\) and weight"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight \(6,\), expected"),
        ({"lora_B": torch.zeros(7)}, ValueError, r"lora_B \(7,\), expected"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias is \(1,\), expected \(7,\)"),
        ({"x": torch.zeros(4, 5)}, ValueError, r"x is \(4, 5\).*weight \(7, 6\).*weight\.t\(\)"),
        ({"lora_A": torch.zeros(3, 7)}, ValueError, r"expected \(r, 6\) and \(7, r\)"),
        ({"lora_B": torch.zeros(7, 2)}, ValueError, r"lora_B \(7, 2\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias is \(6,\), expected \(7,\)"),
        (
            {"weight": torch.zeros(7, 6, dtype=torch.float16)},
            TypeError,
            r"is torch.float32, weight torch.float16",
        ),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "expected floating point"),
    ],
)
def test_errors_say_what_was_given_and_expected(changes, error, says):
    tensors = draw(4, dtype=torch.float32) | changes
    with pytest.raises(error, match=says):
        lora_linear(*tensors.values(), 0.5)


def test_a_second_derivative_is_refused_not_wrong():
    tensors = draw(4)
    y = lora_linear(*tensors.values(), 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_on_a_cpu_a_transform_of_functions_is_refused_not_wrong(transform):
    tensors = draw(3, 4, trained=())

    def result(x):
        return lora_linear(x, *list(tensors.values())[1:], 0.5).square().sum()

    with pytest.raises(RuntimeError):
        transform(result)(tensors["x"])
