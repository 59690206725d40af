"""From rows to tensors: what is encoded, what is padded, what counts."""

from typing import Any

import pytest
import torch

from pefttutor.data.batches import collate, count_targets, predicts_next
from pefttutor.data.encoding import answer_ids, encode, prompt_ids
from tests.data.tokenizers_of_all_kinds import KINDS, like_bert, like_roberta, with_blanks_behind
from tests.tiny import bert, llama, llama_classifier, tokenizer

TOKENIZER = tokenizer()


def test_classification_takes_text_and_label() -> None:
    (example,) = encode([{"text": "A bad day", "label": 2, "prompt": "x", "answer": "y"}], TOKENIZER)
    assert TOKENIZER.decode(example["input_ids"]) == "<s>A bad day"
    assert example["labels"].shape == ()
    assert example["labels"] == 2
    assert example["attention_mask"].tolist() == [1] * len(example["input_ids"])


@pytest.mark.parametrize("kind", ["generation", "lm", None])
def test_generation_learns_the_answer_and_its_end_only(kind: str | None) -> None:
    (example,) = encode([{"prompt": "The baker likes Answer:", "answer": " yes"}], TOKENIZER, kind=kind)
    learned = example["labels"] != -100
    assert TOKENIZER.decode(example["input_ids"]) == "<s>The baker likes Answer: yes</s>"
    assert TOKENIZER.decode(example["input_ids"][learned]) == " yes</s>"
    assert torch.equal(example["labels"][learned], example["input_ids"][learned])


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Answer: ", "yes"), ("Answer:", " yes"), ("Answer:\n", "yes")]
)
def test_prompt_and_answer_are_cut_where_the_tokens_are(prompt: str, answer: str) -> None:
    (example,) = encode([{"prompt": prompt, "answer": answer}], TOKENIZER)
    assert example["input_ids"].tolist() == [*TOKENIZER(prompt + answer)["input_ids"], TOKENIZER.eos_token_id]
    ids, blanks = prompt_ids(TOKENIZER, prompt)
    learned = example["labels"] != -100
    assert example["labels"][learned].tolist()[:-1] == answer_ids(TOKENIZER, blanks, answer)
    assert example["input_ids"][~learned].tolist() == ids


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt() -> None:
    from tokenizers import processors

    closing = tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <sep>", special_tokens=[("<s>", 1), ("<sep>", 5)]
    )
    assert closing("Answer:")["input_ids"][-1] == 5
    assert prompt_ids(closing, "Answer:")[0] == TOKENIZER("Answer:")["input_ids"]
    assert prompt_ids(closing, "Answer:<sep>")[0][-1] == 5  # that one was asked for


CUTS = [
    "Answer:\n|yes",
    "Answer: |yes",
    "Answer:| yes",
    "Answer:|yes",
    "|yes",
    "Answer: yes |no",
    "Answer:  \n|no",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", CUTS)
def test_prompt_and_answer_are_what_the_joined_text_gives(kind: str, text: str) -> None:
    words, (prompt, answer) = KINDS[kind](), text.split("|")
    closing = [token for token in (words.eos_token_id, words.sep_token_id) if token is not None]
    joined = [i for i in words(prompt + answer)["input_ids"] if i not in closing]
    alone = [i for i in words(prompt.rstrip(" "))["input_ids"] if i not in closing]
    (example,) = encode([{"prompt": prompt, "answer": answer}], words)
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    assert example["input_ids"].tolist() == joined + end
    learned = (example["labels"] != -100).tolist()
    n = learned.index(True)
    assert learned == [False] * n + [True] * (len(learned) - n)
    assert example["input_ids"][:n].tolist() == alone[:n]  # what is there when an answer is asked for
    assert n == len(alone) or alone[n] != joined[n]  # and nothing more is an answer
    assert answer_ids(words, prompt, answer) == joined[n:]


def test_an_answer_gets_no_blank_that_is_not_there() -> None:
    words = like_roberta()
    (example,) = encode([{"prompt": "Answer:\n", "answer": "yes"}], words)
    learned = words.convert_ids_to_tokens(example["input_ids"][example["labels"] != -100].tolist())
    assert learned == ["yes", "</s>"]


def test_the_end_is_learned_and_padding_is_not_although_they_are_the_same_token() -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    rows = encode([{"prompt": "Say:", "answer": " yes"}, {"prompt": "Say:", "answer": " good bread"}], words)
    batch = collate(rows, words.pad_token_id)
    end = words.eos_token_id
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        last = int(mask.sum()) - 1
        assert (ids[last], labels[last]) == (end, end)
        assert (ids[last:] == end).all()
        assert (labels[last + 1 :] == -100).all()


@pytest.mark.parametrize(
    ("label", "expected"),
    [(3, torch.tensor(3)), (3.8, torch.tensor(3.8)), (2.0, torch.tensor(2.0)), (True, torch.tensor(1)),
     ([1, 0, 1], torch.tensor([1.0, 0.0, 1.0])), ([0.5, 1.5], torch.tensor([0.5, 1.5])), ("2", torch.tensor(2))],
)  # fmt: skip
def test_labels_keep_their_kind(label: Any, expected: torch.Tensor) -> None:
    (example,) = encode([{"text": "A bad day", "label": label}], TOKENIZER)
    assert example["labels"].dtype == expected.dtype
    assert torch.equal(example["labels"], expected)


def test_too_long_keeps_the_start_of_a_text_and_the_end_of_a_prompt() -> None:
    words = "The baker likes the good bread. " * 9
    (text,) = encode([{"text": words, "label": 0}], TOKENIZER, max_length=8)
    assert text["input_ids"].tolist() == TOKENIZER(words)["input_ids"][:8]
    (row,) = encode([{"prompt": words + "Answer:", "answer": " yes"}], TOKENIZER, max_length=8)
    assert len(row["input_ids"]) == 8
    assert TOKENIZER.decode(row["input_ids"]).endswith("Answer: yes</s>")
    with pytest.warns(
        UserWarning, match="1 of 1 answers are longer than max_length=8 and have lost their end, </s>"
    ):
        (row,) = encode([{"prompt": "Answer:", "answer": words}], TOKENIZER, max_length=8)
    assert (row["labels"] != -100).tolist() == [False] + [True] * 7  # something is left to predict from


def test_running_text_is_cut_in_silence_and_an_answer_that_just_fits_keeps_its_end() -> None:
    words = "The baker likes the good bread. " * 9
    (row,) = encode([{"prompt": "", "answer": words}], TOKENIZER, max_length=8)
    assert len(row["input_ids"]) == 8
    (whole,) = encode([{"prompt": "Answer:", "answer": " yes"}], TOKENIZER)
    (row,) = encode(
        [{"prompt": "Answer:", "answer": " yes"}],
        TOKENIZER,
        max_length=1 + int((whole["labels"] != -100).sum()),
    )
    assert row["labels"][-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_token_is_a_label_once_and_padding_never_one(kind: str) -> None:
    words = KINDS[kind]()
    rows = [
        {"prompt": "Say it: ", "answer": answer} for answer in ("yes", "no", f"yes{words.eos_token or ''}")
    ]
    end = words.eos_token_id
    for pad in {words.pad_token_id, end} - {None}:  # GPT-2's kind pads with its end token
        for side in ("left", "right"):
            batch = collate(encode(rows, words), pad, side)
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
            if end is not None:
                assert (batch["labels"] == end).sum(1).tolist() == [1, 1, 1]


def test_tagging_labels_the_last_piece_of_each_word() -> None:
    words = ["The", "unbreakable", "bread"]
    (example,) = encode([{"tokens": words, "tags": [1, 0, 2]}], TOKENIZER)
    assert TOKENIZER.decode(example["input_ids"]) == "<s>The unbreakable bread"
    at = (example["labels"] != -100).nonzero().flatten().tolist()
    assert example["labels"][at].tolist() == [1, 0, 2]
    ends = [TOKENIZER.decode(example["input_ids"][: end + 1]) for end in at]
    assert ends == ["<s>The", "<s>The unbreakable", "<s>The unbreakable bread"]


@pytest.mark.parametrize("kind", KINDS)
def test_tagging_reads_the_words_as_one_text(kind: str) -> None:
    words = KINDS[kind]()
    closing = [token for token in (words.eos_token_id, words.sep_token_id) if token is not None]
    (example,) = encode([{"tokens": ["the", "unbreakable", "bread", "!"], "tags": [1, 0, 2, 3]}], words)
    whole = [i for i in words("the unbreakable bread !")["input_ids"] if i not in closing]
    assert example["input_ids"].tolist() == whole
    assert example["labels"][example["labels"] != -100].tolist() == [1, 0, 2, 3]
    assert example["labels"][-1] == 3


@pytest.mark.parametrize(
    ("words", "left"),
    [(["a", "\u200b", "b", "c"], [1, 2, 3]), (["\u200b", "a", "b", "c"], [0, 2, 3]),
     (["a", "b", "c", "\u200b"], [1, 0, 2]), (["", "a", " ", "b"], [0, 3])],
)  # fmt: skip
def test_a_word_of_which_nothing_is_left_has_no_label(words: list[str], left: list[int]) -> None:
    (example,) = encode([{"tokens": words, "tags": [1, 0, 2, 3]}], like_bert())
    assert example["labels"][example["labels"] != -100].tolist() == left
    assert len(example["labels"]) == len(example["input_ids"])


def test_a_blank_that_belongs_to_the_word_before_it_moves_no_tag() -> None:
    words, tokens = ["the", "unbreakable", "bread", "!"], with_blanks_behind()
    (example,) = encode([{"tokens": words, "tags": [1, 0, 2, 3]}], tokens)
    at = (example["labels"] != -100).nonzero().flatten().tolist()
    assert example["labels"][at].tolist() == [1, 0, 2, 3]
    ends = [tokens.decode(example["input_ids"][: end + 1]).strip() for end in at]
    assert ends == ["<s>the", "<s>the unbreakable", "<s>the unbreakable bread", "<s>the unbreakable bread !"]


def test_tags_of_words_that_share_a_token_are_refused() -> None:
    tokens = with_blanks_behind(across=True)
    words = ["x", "good", "bread", "y", "z"]
    assert len(tokens("good bread")["input_ids"]) < len(tokens("good")["input_ids"]) + len(
        tokens("bread", add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(
        ValueError, match=r"no token .* ends where 'good' ends before 'bread'.*expected one that keeps"
    ):
        encode([{"tokens": words, "tags": [1, 0, 2, 3, 0]}], tokens)


@pytest.mark.parametrize("row", [{"text": "A day", "label": 0}, {"prompt": "A day", "answer": " yes"},
                                 {"tokens": ["A", "day"], "tags": [0, 1]}])  # fmt: skip
@pytest.mark.parametrize("wrong", [0, -3])
def test_a_length_below_one_is_refused(row: dict[str, Any], wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^max_length={wrong}, expected a whole number of at least 1"):
        encode([row], TOKENIZER, max_length=wrong)


def test_encode_refuses_what_it_cannot_do() -> None:
    with pytest.raises(
        ValueError, match=r"kind='images' is unknown; expected one of classification, generation"
    ):
        encode([], TOKENIZER, kind="images")
    with pytest.raises(ValueError, match=r"needs the columns text, label; this split has text"):
        encode([{"text": "a"}], TOKENIZER, kind="classification")
    with pytest.raises(ValueError, match=r"a row has 2 tokens but 1 tags"):
        encode([{"tokens": ["a", "b"], "tags": [1]}], TOKENIZER)


def test_collate_pads_each_key_its_own_way() -> None:
    rows = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids)), "labels": torch.tensor(ids)}
        for ids in ([5, 6, 7], [8])
    ]
    right, left = collate(rows, 9), collate(rows, 9, side="left")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]
    scalars: list[dict[str, Any]] = [{"labels": torch.tensor(1)}, {"labels": torch.tensor(0)}]
    assert collate(scalars)["labels"].tolist() == [1, 0]
    matrices = [{"x": torch.ones(n, 2)} for n in (1, 3)]
    assert collate(matrices)["x"].sum(-1).tolist() == [[2, 0, 0], [2, 2, 2]]
    decoded = [{"decoder_input_ids": torch.tensor(ids)} for ids in ([5, 6], [8])]
    assert collate(decoded, 9)["decoder_input_ids"].tolist() == [[5, 6], [8, 9]]
    for no_token in (None, -1):
        assert collate(rows, no_token)["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    with pytest.raises(ValueError, match="side='top' is unknown"):
        collate(rows, side="top")
    with pytest.raises(ValueError, match="all examples need the same keys"):
        collate([rows[0], {"input_ids": torch.tensor([1])}])


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ([torch.ones(1, 3), torch.ones(1, 5)], r"\(1, 3\), \(1, 5\)"),
        ([torch.ones(1, 3), torch.ones(1, 3)], r"\(1, 3\)"),
        ([torch.ones(3), torch.tensor(1.0)], r"\(3,\), \(\)"),
    ],
)
def test_what_cannot_be_stacked(values: list[torch.Tensor], shapes: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'input_ids' of the examples has the shapes {shapes}; expected one seq"
    ):
        collate([{"input_ids": value} for value in values])
    with pytest.raises(ValueError, match="there are no examples to collate"):
        collate([])


def test_padding_changes_neither_side_of_a_models_answer() -> None:
    model = llama()
    ids = torch.tensor(TOKENIZER("The baker likes bread.")["input_ids"])
    rows = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in (ids, ids[:3])]
    alone = model(**collate(rows[1:])).logits[0]
    assert torch.allclose(model(**collate(rows)).logits[1, :3], alone, atol=1e-5)
    left = collate(rows, side="left")
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.allclose(model(**left, position_ids=positions).logits[1, -3:], alone, atol=1e-5)


def test_what_a_loss_averages_over() -> None:
    labels = torch.tensor([[5, -100, 6], [-100, 7, -100]])
    assert count_targets({"labels": labels}, shifted=False) == 3
    assert count_targets({"labels": labels}, shifted=True) == 2
    assert count_targets({"labels": torch.tensor([0, 1, 1])}, shifted=True) == 3
    assert count_targets({"labels": torch.tensor([0.5, 1.5])}, shifted=True) == 2
    assert count_targets({"x": torch.ones(4, 2)}, shifted=True) == 4
    assert [predicts_next(model) for model in (llama(), llama_classifier(), bert())] == [True, False, False]
