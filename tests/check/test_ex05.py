"""The checks of notebook 05 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import Adapter, check
from pefttutor.check import ex05
from tests.check.rejection import reason
from tests.tiny import tiny_model


def test_right_answers_written_in_another_way_pass(capsys):
    class TwoLayers(nn.Module):
        def __init__(self, width, m, scaling, generator):
            super().__init__()
            self.s, self.width = scaling, width
            self.down = nn.Parameter(torch.empty(m, width))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
            self.down_bias = nn.Parameter(torch.rand(m) / 100)
            self.up, self.up_bias = nn.Parameter(torch.zeros(width, m)), nn.Parameter(torch.zeros(width))

        def forward(self, h):
            return F.linear(F.gelu(F.linear(h, self.down, self.down_bias)), self.up, self.up_bias) * self.s

    def placed(f, x, adapter, placement):
        y = f(x)
        return adapter(y) + y if placement != "parallel" else y + adapter(x)

    def count(width, m, blocks, placement, norm_values):
        adapters = 2 * blocks if placement == "houlsby" else blocks
        return norm_values + adapters * (m * (2 * width + 1) + width)

    def together(x, blocks, tasks, skip):
        states = {}
        for i, block in enumerate(blocks):
            if i < skip:
                x = block(x, None)
            else:
                states = {name: block(states.get(name, x), adapters[i]) for name, adapters in tasks.items()}
        return states or dict.fromkeys(tasks, x)

    answers = {
        check.ex05_1: TwoLayers,
        check.ex05_2: placed,
        check.ex05_3: count,
        check.ex05_4: together,
    }
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_the_package_counts_as_the_reference_does(placement):
    model = tiny_model("llama")
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    found = Adapter(placement=placement, bottleneck=3).count(model)
    assert found == ex05.adapter_count(width, 3, blocks, placement, 0)


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex05_1, lambda **inputs: None, "AttributeError"),
        (check.ex05_1, lambda **inputs: nn.Linear(inputs["width"], inputs["m"]), "no attribute 'down'"),
        (check.ex05_1, lambda width, m, **others: ex05.Bottleneck(m, width, **others), "shapes"),
        (check.ex05_2, lambda f, x, adapter, placement: f, "y"),
        (check.ex05_2, lambda f, x, adapter, placement: f(x) + adapter(x.T), "RuntimeError"),
        (check.ex05_3, lambda **inputs: None, "None"),
        (check.ex05_3, lambda **inputs: inputs["width"], "20"),
        (check.ex05_4, lambda **inputs: list(ex05.for_all_tasks(**inputs).values()), "results"),
        (check.ex05_4, lambda x, blocks, tasks, skip: blocks[0](x), "TypeError"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
