"""The checks of notebook 06 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pefttutor import Adapter, AdapterFusion, check
from pefttutor.check import ex06
from pefttutor.check.values import draw
from pefttutor.kernels.fusion_attention import fusion_attention
from tests.check.rejection import reason
from tests.tiny import tiny_model


def test_right_answers_written_in_another_way_pass(capsys):
    def shares(h, z, query, query_bias, key):
        return torch.einsum("...d,...nd->...n", F.linear(h, query, query_bias) @ key, z).softmax(-1)

    def placed(h, adapters, choose, value):
        words = [adapter(h) for adapter in adapters]
        s = choose(h, torch.stack(words, -2)).unbind(-1)
        for share, word in zip(s, words, strict=True):
            h = h + share.unsqueeze(-1) * F.linear(word, value)
        return h

    def start(width, generator):
        key, query = (torch.empty(width, width).normal_(0, 0.02, generator=generator) for _ in range(2))
        return query, torch.zeros(width), key, torch.eye(width)

    def penalty(values, weight):
        total = 0
        for v in values:
            total = total + F.mse_loss(v, torch.eye(v.shape[0]), reduction="sum")
        return weight * total

    answers = {check.ex06_1: shares, check.ex06_2: placed, check.ex06_3: start, check.ex06_4: penalty}
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


def test_the_kernel_computes_what_the_references_do():
    h, adapters = draw(2, 4, 6, seed=1), [lambda x, k=k: torch.sin(k * x) for k in (1, 2, 3)]
    query, key, value, bias = (draw(6, *rest, seed=2 + i) / 2 for i, rest in enumerate([(6,)] * 3 + [()]))
    found = ex06.fused_sublayer(h, adapters, lambda h, z: ex06.shares(h, z, query, bias, key), value)
    z = torch.stack([adapter(h) for adapter in adapters], -2)
    torch.testing.assert_close(found, h + fusion_attention(h, z, query, bias, key, value))


def test_the_package_starts_and_pulls_as_the_references_do():
    model = tiny_model("llama")
    for name in ("a", "b"):
        Adapter(placement="pfeiffer", bottleneck=3).attach(model, name=name)
    method = AdapterFusion(adapters=("a", "b"), regularization_weight=0.3)
    method.attach(model, name="f")
    named = {n: p for n, p in model.named_parameters() if n.endswith("@f")}
    values = [p for n, p in named.items() if "fusion_value" in n]
    width = len(values[0])
    _, bias, _, value = ex06.fusion_start(width, torch.Generator().manual_seed(0))
    for n, p in named.items():
        for key, expected in (("value", value), ("bias", bias)):
            assert key not in n or torch.equal(p, expected)
    for value in values:
        value.data += draw(width, width, seed=3)
    torch.testing.assert_close(method.penalty(model), ex06.penalty(copy.deepcopy(values), 0.3))


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex06_1, lambda **inputs: None, "None"),
        (check.ex06_1, lambda h, z, query, query_bias, key: z, "shape"),
        (check.ex06_1, lambda h, z, query, query_bias, key: h @ z, "RuntimeError"),
        (check.ex06_2, lambda h, adapters, choose, value: h, "y"),
        (check.ex06_2, lambda h, adapters, choose, value: choose(h, adapters), "Error"),
        (check.ex06_3, lambda width, generator: None, "TypeError"),
        (check.ex06_3, lambda width, generator: [torch.eye(width)] * 4, "shapes"),
        (check.ex06_4, lambda values, weight: weight, "penalty"),
        (check.ex06_4, lambda values, weight: weight * values, "Error"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
