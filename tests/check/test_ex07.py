"""The checks of notebook 07 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import pytest
import torch
import transformers as hf

from pefttutor import ProxyTuning, check
from pefttutor.check import ex07
from pefttutor.parts.beside import run_beside
from tests.check.rejection import reason
from tests.tiny import tiny_model


def test_right_answers_written_in_another_way_pass(capsys):
    def product(own, expert, anti, alpha):  # p ∝ p_M (p_M⁺ / p_M⁻)^α
        p, plus, minus = (s.double().softmax(-1) for s in (own, expert, anti))
        found = p * (plus / minus) ** alpha
        return (found / found.sum(-1, keepdim=True)).log().float()

    def loop(models, tokens, alpha, steps):
        said, caches = zip(*(read(tokens, None) for read in models), strict=True)
        written = tokens[:, :0]
        for i in range(steps):
            own, plus, minus = (s[:, -1] for s in said)
            written = torch.cat([written, (own + alpha * (plus - minus)).argmax(1)[:, None]], 1)
            if i < steps - 1:
                went_on = [read(written[:, -1:], c) for read, c in zip(models, caches, strict=True)]
                said, caches = zip(*went_on, strict=True)
        return written

    def top(shown, ids, expert, anti, alpha):  # constants of each model cancel
        difference = expert.log_softmax(-1) - anti.log_softmax(-1)
        found = torch.full(expert.shape, float("-inf"))
        for row, (places, values) in enumerate(zip(ids, shown, strict=True)):
            found[row, places] = values + alpha * difference[row, places]
        return found.log_softmax(-1)

    def rows(x, weight, lora_A, lora_B, scaling, on):
        delta = scaling * lora_B @ lora_A
        return torch.stack([row @ (weight + mark * delta).T for row, mark in zip(x, on, strict=True)])

    answers = {check.ex07_1: product, check.ex07_2: loop, check.ex07_3: top, check.ex07_4: rows}
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


def test_the_reference_writes_what_the_package_writes():
    """Against `generate` of a model with ProxyTuning attached, greedily, without padding."""
    models = [tiny_model("llama", seed=i) for i in range(3)]
    tokens = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    readers = [lambda t, c, m=m: run_beside(m, {"input_ids": t, "use_cache": True}, c) for m in models]
    written = ex07.write_steered(readers, tokens, 0.7, 4)
    model = ProxyTuning(alpha=0.7).attach(*models)
    greedy = hf.GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(tokens)
    assert torch.equal(model.generate(tokens, attention_mask=mask, generation_config=greedy)[:, 5:], written)


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex07_1, lambda own, expert, anti, alpha: expert.log_softmax(-1), "numbers|differ|expected"),
        (check.ex07_1, lambda own, expert, anti, alpha: own.argmax(-1), "shape"),
        (check.ex07_1, lambda own, expert, anti, alpha: None, "None"),
        (check.ex07_2, lambda models, tokens, alpha, steps: tokens[0], "shape"),
        (check.ex07_2, lambda models, tokens, alpha, steps: models[0](tokens), "TypeError|tuple"),
        (check.ex07_3, lambda shown, ids, expert, anti, alpha: expert[ids], "IndexError|shape"),
        (check.ex07_4, lambda x, weight, lora_A, lora_B, scaling, on: x @ weight, "RuntimeError"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert any(word in reason(check_function, attempt) for word in says.split("|"))
