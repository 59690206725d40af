"""The machinery of the checks: three outcomes, and messages that name the mistake."""

import pytest
import torch
from torch import nn

from pefttutor import check
from pefttutor.check.compare import same_result
from pefttutor.check.core import CORRECT, NOT_ATTEMPTED, call, exercise, wrong
from pefttutor.check.values import close, describe, fresh


def delta(lora_A, lora_B, lora_alpha, r):
    return lora_B @ lora_A * (lora_alpha / r)


def swapped(lora_A, lora_B, lora_alpha, r):
    return lora_A.mT @ lora_B.mT * (lora_alpha / r)


def unscaled(lora_A, lora_B, lora_alpha, r):
    return lora_B @ lora_A


def a_detached(lora_A, lora_B, lora_alpha, r):
    return lora_B @ lora_A.detach() * (lora_alpha / r)


MISTAKES = {"the scaling lora_alpha / r is missing": unscaled, "A and B are swapped": swapped}


def draws():
    generator = torch.Generator().manual_seed(1)
    return {
        "lora_A": torch.randn(2, 5, generator=generator),
        "lora_B": torch.randn(3, 2, generator=generator),
        "lora_alpha": 16,
        "r": 2,
    }


@exercise("98.1", reference=delta)
def ex98_1(attempt):
    """A check as a lesson's author writes it."""
    same_result(attempt, delta, draws(), gradients=("lora_A", "lora_B"), mistakes=MISTAKES)


def stub(lora_A, lora_B, lora_alpha, r):
    raise NotImplementedError("exercise 98.1")


def message_of(attempt):
    with pytest.raises(AssertionError) as caught:
        ex98_1(attempt)
    return str(caught.value)


def test_not_attempted_returns_the_reference_and_says_so(capsys):
    assert ex98_1(stub) is delta
    assert capsys.readouterr().out == NOT_ATTEMPTED.format("98.1") + "\n"


def test_right_returns_the_learners_own_and_says_so(capsys):
    def own(lora_A, lora_B, lora_alpha, r):
        return torch.einsum("ki,ok->oi", lora_A, lora_B) * lora_alpha / r

    assert ex98_1(own) is own
    assert capsys.readouterr().out == CORRECT.format("98.1") + "\n"


def in_numpy(lora_A, lora_B, lora_alpha, r):
    return (lora_B @ lora_A * lora_alpha / r).detach().numpy()


def from_data(lora_A, lora_B, lora_alpha, r):
    return delta(lora_A.data, lora_B.data, lora_alpha, r)


def in_place(lora_A, lora_B, lora_alpha, r):
    result = delta(lora_A, lora_B, lora_alpha, r)
    lora_A.data.mul_(2)
    return result


def in_double(lora_A, lora_B, lora_alpha, r):
    return delta(lora_A, lora_B, lora_alpha, r).double()


def transposed(lora_A, lora_B, lora_alpha, r):
    return delta(lora_A, lora_B, lora_alpha, r).mT.contiguous()


def forgets_to_return(lora_A, lora_B, lora_alpha, r):
    delta(lora_A, lora_B, lora_alpha, r)


def ten_times(lora_A, lora_B, lora_alpha, r):
    return delta(lora_A, lora_B, lora_alpha, r) * 10


def needs_square(lora_A, lora_B, lora_alpha, r):
    return lora_A @ lora_B * lora_alpha / r


def other_arguments(a, b):
    return b @ a


def two_results(lora_A, lora_B, lora_alpha, r):
    return delta(lora_A, lora_B, lora_alpha, r), r


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (unscaled, ["likely", "the scaling lora_alpha / r is missing"]),
        (swapped, ["(5, 3)", "A and B are swapped"]),
        (a_detached, ["gradient", "lora_A"]),
        (in_numpy, ["a tensor, float32 (3, 5)", "ndarray"]),
        (from_data, ["gradients", ".detach()"]),
        (in_place, ["lora_A has changed", "in place"]),
        (in_double, ["torch.float64", "dtype"]),
        (forgets_to_return, ["None", "doesn't return"]),
        (ten_times, ["every number is 10 times"]),
        (needs_square, ["RuntimeError", "return lora_A @ lora_B * lora_alpha / r"]),
        (other_arguments, ["TypeError", "lora_A"]),
        (two_results, ["tuple of float32 (3, 5)"]),
    ],
)
def test_a_wrong_answer_is_named(attempt, words, capsys):
    message = message_of(attempt)
    assert message.startswith("Exercise 98.1: not yet.\n  input ")
    assert "lora_A float32 (2, 5)" in message
    assert [word for word in words if word not in message] == []
    assert capsys.readouterr().out == ""


def test_transposed_is_said_when_no_known_mistake_matches():
    with pytest.raises(AssertionError, match="it is transposed"):
        same_result(transposed, delta, draws())


def test_a_known_mistake_that_raises_is_recognised():
    mistakes = {"A and B the wrong way round": needs_square}
    with pytest.raises(AssertionError, match="A and B the wrong way round"):
        same_result(lambda lora_A, lora_B, lora_alpha, r: lora_A @ lora_B, delta, draws(), mistakes=mistakes)


def test_a_known_mistake_is_recognised_by_its_gradient_alone():
    mistakes = {"lora_A is cut off": a_detached}
    with pytest.raises(AssertionError, match="lora_A is cut off"):
        same_result(a_detached, delta, draws(), gradients=("lora_A",), mistakes=mistakes)


def test_a_frozen_input_must_get_no_gradient():
    inputs = {"weight": torch.ones(2, 3), "x": torch.ones(3)}
    with pytest.raises(AssertionError, match="no gradient for weight"):
        same_result(
            lambda weight, x: weight @ x,
            lambda weight, x: weight.detach() @ x,
            inputs,
            gradients=("weight", "x"),
        )


def test_a_base_model_changed_in_place_is_seen():
    def forward(layer, x):
        return layer(x)

    def merges(layer, x):
        result = layer(x)
        layer.weight.data += 1
        return result

    inputs = {"layer": nn.Linear(3, 2), "x": torch.ones(1, 3)}
    same_result(forward, forward, inputs)
    with pytest.raises(AssertionError, match="layer has changed"):
        same_result(merges, forward, inputs)


def test_a_rule_that_changes_its_input_is_compared_afterwards():
    def halve(x):
        x.mul_(0.5)

    same_result(lambda x: x.div_(2) and None, halve, {"x": torch.ones(1)})
    with pytest.raises(AssertionError, match="x isn't what it should be afterwards"):
        same_result(lambda x: None, halve, {"x": torch.ones(2)})


def test_the_learner_never_changes_the_checks_own_inputs():
    inputs = draws()
    before = inputs["lora_A"].clone()
    with pytest.raises(AssertionError):
        same_result(in_place, delta, inputs)
    assert torch.equal(inputs["lora_A"], before)


def test_a_result_instead_of_the_function_is_explained():
    assert "expected  the function itself: check.ex98_1(delta)" in message_of(delta(**draws()))


def test_a_stub_that_is_a_class_counts_as_not_attempted():
    class Layer:
        def forward(self, x):
            raise NotImplementedError("exercise 98.2")

    @exercise("98.2", reference=nn.Linear)
    def ex98_2(attempt):
        call(attempt().forward, torch.ones(1))

    assert ex98_2(Layer) is nn.Linear


def test_another_not_implemented_error_is_a_wrong_answer():
    def raises(**_inputs):
        raise NotImplementedError("no kernel for this dtype")

    assert "NotImplementedError: no kernel for this dtype" in message_of(raises)


def test_an_assert_in_the_learners_code_is_a_wrong_answer_with_its_line():
    def asserts(lora_A, lora_B, lora_alpha, r):
        assert r > 100, "r is small"

    message = message_of(asserts)
    assert "AssertionError: r is small" in message
    assert "assert r > 100" in message


def test_a_notebook_shows_the_message_alone():
    with pytest.raises(AssertionError) as caught:
        ex98_1(unscaled)
    assert caught.value._render_traceback_() == str(caught.value).splitlines()


def test_wrong_aligns_its_lines_and_leaves_out_what_is_unknown():
    error = wrong(input="x", expected="a\nb", likely=None)
    assert str(error) == "  input     x\n  expected  a\n            b"


def test_copies_share_nothing_but_keep_what_is_tied():
    shared = nn.Linear(2, 2)
    copies = fresh({"a": shared, "b": [shared]})
    assert copies["a"] is copies["b"][0]
    assert copies["a"] is not shared


def test_close_compares_names_shapes_and_numbers():
    assert close({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert not close({"a": torch.ones(2)}, {"b": torch.ones(2)})
    assert not close(torch.ones(2), torch.ones(2, 1))
    assert not close(torch.ones(2), torch.full((2,), 1.01))
    assert not close(True, 1)
    assert close(1, 1.0)


def test_describe_is_short():
    assert describe(torch.ones(2, 3, dtype=torch.bfloat16)) == "bfloat16 (2, 3)"
    assert describe(nn.Linear(1, 1)) == "a Linear"
    assert describe("x" * 100) == "a str"


def test_an_unknown_check_lists_what_there_is():
    with pytest.raises(AttributeError, match="check has no 'ex99_1'; there are exercises for "):
        _ = check.ex99_1
    with pytest.raises(AttributeError, match="check has no 'exercise'"):
        _ = check.exercise


def test_checks_are_found_in_the_module_of_their_notebook(tmp_path, monkeypatch):
    (tmp_path / "ex98.py").write_text("def ex98_1(attempt):\n    return 'found'\n")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(check, "__path__", [str(tmp_path)])
    assert check.ex98_1(None) == "found"
    assert dir(check) == ["ex98_1"]
    with pytest.raises(AttributeError, match="check has no 'ex98_7'; notebook 98 has ex98_1"):
        _ = check.ex98_7


def refused(attempt, reference, **inputs):
    with pytest.raises(AssertionError) as error:
        same_result(attempt, reference, inputs)
    return str(error.value)


def test_numbers_are_shown_from_the_first_wrong_one_on():
    said = refused(lambda x: x + (x > 6), lambda x: x.clone(), x=torch.arange(10.0).view(2, 5))
    assert "numbers at [1, 2] 7, 8, 9" in said
    assert "numbers at [1, 2] 8, 9, 10" in said
    said = refused(lambda x: x + 1, lambda x: x.clone(), x=torch.tensor([0.0, 5, 5, 7]))
    assert "numbers 0, 5, 5, 7" in said
    assert "numbers 1, 6, 6, 8" in said


def test_a_gradient_is_shown_from_the_first_wrong_number_on():
    x = torch.arange(1.0, 9).view(2, 4)
    with pytest.raises(AssertionError, match=r"the gradient at \[1, 1\] (?s:.*)"):
        same_result(
            lambda x: x.clamp(max=5.5) + (x - x.clamp(max=5.5)).detach(),
            lambda x: x * 1,
            {"x": x},
            gradients=("x",),
        )


def test_of_two_long_lists_the_first_difference_is_shown():
    names = [f"model.layers.{i}.weight" for i in range(9)]
    said = refused(lambda names: [*names[:4], *names[5:]], lambda names: list(names), names=names)
    assert "a list of 9, and [4] is 'model.layers.4.weight'" in said
    assert "a list of 8, and [4] is 'model.layers.5.weight'" in said
    said = refused(lambda names: names[:4], lambda names: list(names), names=names)
    assert "a list of 4, which ends there" in said


def test_a_tensor_of_one_number_is_a_number():
    assert same_result(lambda x: torch.tensor(x) / 2, lambda x: x / 2, {"x": 3.0}) == 1.5
    assert same_result(lambda x: torch.tensor(x), lambda x: x, {"x": 3}) == 3
    with pytest.raises(AssertionError, match=r"expected *1\.5\n *came *float32 3"):
        same_result(lambda x: torch.tensor(x), lambda x: x / 2, {"x": 3.0})
