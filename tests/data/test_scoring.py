"""score: every kind of task, against answers computed by hand or by plain transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import BertForTokenClassification

from pefttutor.data import TaskInfo
from pefttutor.data.encoding import encode
from pefttutor.data.scoring import score
from pefttutor.train import evaluate, fit
from tests.data import unusual
from tests.data.moods import MOOD, ROWS, TOKENIZER
from tests.tiny import bert, llama, llama_classifier

REPEAT = TaskInfo(name="repeat", kind="generation", metric="exact_match")
ANSWERS = [{"prompt": f"Say {word}:", "answer": f" {word}"} for word in ("bread", "bank", "day", "good day")]


def test_classification_by_a_head_is_the_head_s_accuracy() -> None:
    model = llama_classifier().train()
    expected = evaluate(model, encode(ROWS, TOKENIZER))["accuracy"]
    assert score(model, TOKENIZER, ROWS, MOOD, batch_size=4) == expected
    assert score(model, TOKENIZER, ROWS, MOOD, limit=1) in (0.0, 1.0)
    assert model.training


def test_label_words_are_compared_by_their_mean_log_probability() -> None:
    model = llama(initializer_range=0.3)
    right = 0
    for row in ROWS:
        prompt = torch.tensor([TOKENIZER(row["prompt"].rstrip())["input_ids"]])
        means = []
        for word in MOOD.labels or ():
            ids = torch.tensor([TOKENIZER(" " + word, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(torch.cat([prompt, ids], 1)).logits[0, prompt.shape[1] - 1 : -1]
            means.append(log_softmax(logits, -1)[range(ids.shape[1]), ids[0]].mean().item())
        right += means.index(max(means)) == row["label"]
    for batch_size in (1, 7, 32):
        assert score(model, TOKENIZER, ROWS, MOOD, batch_size=batch_size) == pytest.approx(right / len(ROWS))


def test_exact_match_of_a_model_that_has_learned_the_answers() -> None:
    model = llama(hidden_size=32)
    assert score(model, TOKENIZER, ANSWERS, REPEAT) < 0.5
    fit(model, encode(ANSWERS, TOKENIZER), steps=80, lr=1e-2, schedule="constant")
    assert score(model, TOKENIZER, ANSWERS, REPEAT) == 1.0
    wrong = [*ANSWERS[:3], {"prompt": ANSWERS[3]["prompt"], "answer": " good"}]
    assert score(model, TOKENIZER, wrong, REPEAT) == 0.75  # a longer answer is not a match


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a model answer what the test says."""

    def answer(*texts: str) -> None:
        monkeypatch.setattr("pefttutor.data.scoring.generate", lambda *args, **settings: list(texts))

    return answer


def test_what_counts_as_the_same_answer(say: Any) -> None:
    say("  bread ", "bank\nA bad day", "days", "good  day")
    assert score(llama(), TOKENIZER, ANSWERS, REPEAT) == 0.75
    say("bread\nbank")
    assert score(llama(), TOKENIZER, [{"prompt": "", "answer": "bread\nbank"}], REPEAT) == 1.0


def test_execution_accuracy_runs_both_queries(say: Any, tmp_path: Path) -> None:
    (tmp_path / "bank.sql").write_text("CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1), (2);")
    info = TaskInfo(name="bank", kind="generation", metric="execution_accuracy", folder=tmp_path)
    rows = [{"prompt": "", "answer": " SELECT MAX(a) FROM t"}] * 2
    say(" SELECT a FROM t WHERE a > 1", " SELECT MIN(a) FROM t")
    assert score(llama(), TOKENIZER, rows, info) == 0.5
    (tmp_path / "other.sql").write_text("CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (3);")
    with pytest.raises(ValueError, match=r"'bank' has 2 databases in .*expected one, or a column database"):
        score(llama(), TOKENIZER, rows, info)
    say(" SELECT 3", " SELECT 3")
    assert score(llama(), TOKENIZER, [{**row, "database": "other.sql"} for row in rows], info) == 1.0


def test_tagging_counts_words() -> None:
    info = TaskInfo(name="tags", kind="tagging", labels=("a", "b"), metric="token_accuracy")
    rows = [{"tokens": ["The", "bread"], "tags": [0, 1]}, {"tokens": ["A", "bad", "day"], "tags": [1, 1, 0]}]
    model = BertForTokenClassification(bert(num_labels=2).config).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    assert score(model, TOKENIZER, rows, info) == pytest.approx(3 / 5)


def test_perplexity_is_that_of_the_losses_of_single_texts() -> None:
    model = llama(initializer_range=0.3)
    info = TaskInfo(name="prose", kind="generation", metric="perplexity")
    rows = [{"prompt": "", "answer": row["text"]} for row in ROWS]
    total, tokens = 0.0, 0
    for row in rows:  # plain transformers, one text at a time: nothing is padded
        ids = torch.tensor([[*TOKENIZER(row["answer"])["input_ids"], TOKENIZER.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total -= log_softmax(logits, -1).gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    assert score(model, TOKENIZER, rows, info, batch_size=4) == pytest.approx(
        math.exp(total / tokens), rel=1e-4
    )


@pytest.mark.parametrize("info", [MOOD, REPEAT, TaskInfo(name="x", kind="generation", metric="perplexity")])
@pytest.mark.parametrize("wrong", [0, -1])
@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "batch_size"])
def test_a_count_below_one_is_refused(name: str, wrong: int, info: TaskInfo) -> None:
    rows = [{**row, "label": 0} for row in ANSWERS]
    with pytest.raises(ValueError, match=f"^{name}={wrong}, expected a whole number of at least 1"):
        score(llama(), TOKENIZER, rows, info, **{name: wrong})  # type: ignore[arg-type]


def test_max_new_tokens_is_taken_as_given() -> None:
    model = llama(hidden_size=32)
    fit(model, encode(ANSWERS, TOKENIZER), steps=80, lr=1e-2, schedule="constant")
    one = [len(TOKENIZER(row["answer"], add_special_tokens=False)["input_ids"]) == 1 for row in ANSWERS]
    assert 0 < sum(one) < len(ANSWERS)
    assert score(model, TOKENIZER, ANSWERS, REPEAT, max_new_tokens=1) == sum(one) / len(ANSWERS)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match=r"nothing to score: the split has 0 rows"):
        score(llama(), TOKENIZER, [], MOOD)
    with pytest.raises(ValueError, match=r"metric='bleu' of 'x' is unknown, expected one of accuracy"):
        score(llama(), TOKENIZER, ROWS, TaskInfo(name="x", kind="generation", metric="bleu"))
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM can't do 'mood'; expected .*head='classification'"
    ):
        score(bert(), TOKENIZER, ROWS, MOOD)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification can't answer in words"):
        score(llama_classifier(), TOKENIZER, ANSWERS, REPEAT)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration can't answer in words"):
        score(unusual.t5(), TOKENIZER, ANSWERS, REPEAT)
    # Its labels aren't shifted, so its loss of a text isn't that of predicting it.
    with pytest.raises(ValueError, match=r"BartForCausalLM can't answer in words"):
        score(unusual.bart(), TOKENIZER, ANSWERS, TaskInfo(name="x", kind="generation", metric="perplexity"))
    with pytest.raises(
        ValueError, match=r"a regression has no accuracy, and LlamaForSequenceClassification is one"
    ):
        score(llama_classifier(num_labels=1), TOKENIZER, [{**row, "label": 0.5} for row in ROWS], MOOD)
    with pytest.raises(ValueError, match=r"'mood' has no labels to choose from"):
        score(llama(), TOKENIZER, ROWS, TaskInfo(name="mood", kind="classification"))
