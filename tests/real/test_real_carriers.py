"""Real pretrained models and real data from packages: they load, have the right size, and make sense."""

import pytest
import torch

from pefttutor import data, models

pytestmark = pytest.mark.real


def test_smollm2_answers_a_question(capfd: pytest.CaptureFixture[str]) -> None:
    model, words = models.load("smollm2-135m-instruct")
    assert capfd.readouterr() == ("", "")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    asked = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in words.decode(answer)
    classifier, _ = models.load(
        "smollm2-135m-instruct", head="classification", num_labels=2
    )  # converted once only
    assert classifier.score.weight.shape == (2, 576)
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)


def test_minilm_puts_like_sentences_together(capfd: pytest.CaptureFixture[str]) -> None:
    model, words = models.load("all-minilm-l6-v2", head="none")
    assert capfd.readouterr() == ("", "")
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    batch = words(
        ["A cat sat on the mat.", "A kitten rested on a rug.", "Interest rates rose."],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    sentences = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    alike = sentences @ sentences.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]


def test_rotten_tomatoes_splits_share_no_film_and_no_review() -> None:
    splits = data.load("rotten-tomatoes")
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 10_243,
        "validation": 1_166,
        "test": 1_343,
    }
    assert splits["train"].column_names == ["text", "label", "prompt", "answer", "film"]
    films = [set(split["film"]) for split in splits.values()]
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]  # noqa: PT018
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(set(texts)) == len(texts)
    info = data.info("rotten-tomatoes")
    for row in splits["test"].select(range(50)):
        assert row["answer"] == (info.labels or ())[row["label"]]
        assert row["text"] in row["prompt"]
    assert 0.5 < sum(splits["test"]["label"]) / 1_343 < 0.6
    assert data.load("rotten-tomatoes", n=64)["train"].num_rows == 64
