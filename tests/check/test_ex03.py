"""The checks of notebook 03 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import pytest
import torch

import pefttutor
from pefttutor import check, models
from pefttutor.check import ex03
from tests.check.rejection import reason


def test_right_answers_written_in_another_way_pass(capsys):
    def before(prompt, embeds, mask, labels):
        rows = prompt.unsqueeze(0).repeat(embeds.shape[0], 1, 1)
        pad = torch.nn.functional.pad
        return {
            "labels": pad(labels, (len(prompt), 0), value=-100),
            "inputs_embeds": torch.hstack([rows, embeds]),
            "attention_mask": pad(mask, (len(prompt), 0), value=1),
        }

    def start(table, labels, drawn, count):
        result = torch.empty(count, table.shape[1])
        for i in range(count):
            pieces = labels[i] if i < len(labels) else [drawn[i - len(labels)]]
            result[i] = sum(table[piece].detach() for piece in pieces) / len(pieces)
        return result

    def mixed(prompts, task, embeds, mask):
        """With ones where nobody reads, and positions that go on before the prompt."""
        longest = max(len(prompt) for prompt in prompts)
        rows, read = [], []
        for number in task.tolist():
            lack = longest - len(prompts[number])
            rows.append(torch.cat([torch.ones(lack, embeds.shape[2]), prompts[number]]))
            read.append(torch.tensor([0] * lack + [1] * (longest - lack)))
        mask = torch.hstack([torch.stack(read), mask])
        positions = torch.arange(mask.shape[1])[None] - mask.argmax(1)[:, None]
        return {
            "inputs_embeds": torch.hstack([torch.stack(rows), embeds]),
            "attention_mask": mask,
            "position_ids": positions,
        }

    def vote(logits):
        return logits.argmax(-1).mode(0).values

    answers = {check.ex03_1: before, check.ex03_2: start, check.ex03_3: mixed, check.ex03_4: vote}
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


@pytest.fixture(scope="module")
def two_texts():
    model, tokenizer = models.load("campus-nano")
    batch = tokenizer(
        ["The play was fine.", "Two dull and very slow songs."], padding=True, return_tensors="pt"
    )
    return model.eval(), batch["input_ids"], batch["attention_mask"]


def test_the_package_reads_a_prompt_as_the_references_do(two_texts):
    """The logits of `PromptTuning`, whose start is the reference's, and a batch in which each text has its own."""
    model, ids, mask = two_texts
    embeds = model.get_input_embeddings()(ids).detach()
    table, apart = model.get_input_embeddings().weight, []
    prompts = [ex03.label_start(table, [[40], [50, 60, 70]], [80, 90], count) for count in (4, 2)]
    for prompt in prompts:
        method = pefttutor.PromptTuning(num_virtual_tokens=len(prompt))
        model = method.attach(model, [[40], [50, 60, 70]] if len(prompt) == 2 else prompt)
        with torch.no_grad():
            apart.append(model(input_ids=ids, attention_mask=mask).logits)
        model = pefttutor.detach(model)
        inputs = ex03.with_prompt(prompt, embeds, mask, ids)
        del inputs["labels"]
        with torch.no_grad():
            own = model(**inputs).logits[:, len(prompt) :]
        assert torch.allclose(own[mask > 0], apart[-1][mask > 0], atol=1e-4)
    with torch.no_grad():
        both = model(**ex03.mixed_batch(prompts, torch.tensor([1, 0]), embeds, mask)).logits[:, 4:]
    for row, logits in ((0, apart[1]), (1, apart[0])):
        seen = mask[row] > 0
        assert torch.allclose(both[row][seen], logits[row][seen], atol=1e-4)


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex03_1, lambda **inputs: tuple(ex03.with_prompt(**inputs).values()), "tuple"),
        (check.ex03_1, lambda prompt, embeds, mask, labels: torch.cat([prompt, embeds], 1), "RuntimeError"),
        (check.ex03_1, lambda **inputs: ex03.with_prompt(**inputs)["inputs_embeds"], "float32"),
        (check.ex03_2, lambda **inputs: list(ex03.label_start(**inputs)), "list"),
        (check.ex03_2, lambda table, labels, drawn, count: table[labels].mean(1), "Error"),
        (check.ex03_3, lambda **inputs: None, "None"),
        (check.ex03_3, lambda prompts, **others: torch.stack(prompts), "RuntimeError"),
        (check.ex03_3, lambda **inputs: {"inputs_embeds": inputs["embeds"]}, "attention_mask"),
        (check.ex03_4, lambda logits: ex03.vote(logits).tolist(), "came      ["),
        (check.ex03_4, lambda logits: ex03.vote(logits[1:]), "numbers"),
        (check.ex03_4, lambda logits: logits.argmax(2), "shape"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
