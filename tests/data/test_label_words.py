"""likeliest: the label word with the largest mean log-probability, whatever the model keeps between two calls."""

from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from pefttutor.data.label_words import _continued, _goes_on, _read_again, likeliest
from pefttutor.data.scoring import score
from tests.data.moods import MOOD, ROWS, TOKENIZER
from tests.data.tokenizers_of_all_kinds import KINDS, like_bert
from tests.data.unusual import speaker
from tests.tiny import llama


def mean_log(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By the definition: prompt and answer alone, without a cache and without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits, -1)[range(len(answer)), answer].mean().item()


PROMPTS, WORDS = [[1, 7, 9, 11, 8], [1, 12], [1, 5, 6]], [[9], [10, 4, 8], [6, 6]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_label_words_that_go_on_from_a_cached_prompt_get_what_reading_all_again_gives(family: str) -> None:
    model = speaker(family).double()
    found = _continued(model, TOKENIZER, PROMPTS, WORDS)
    for i, prompt in enumerate(PROMPTS):
        for j, answer in enumerate(WORDS):
            # the softmax is taken in float32
            assert found[i, j].item() == pytest.approx(mean_log(model, prompt, answer), abs=1e-5)
    assert _goes_on(model, TOKENIZER, PROMPTS[:2], WORDS)


@pytest.mark.parametrize("family", ["bart", "bloom", "mamba", "bamba"])
def test_label_words_of_models_that_know_no_positions_or_keep_another_cache(family: str) -> None:
    model = speaker(family)
    wanted = [[mean_log(model, prompt, answer) for answer in WORDS] for prompt in PROMPTS]
    assert torch.allclose(_read_again(model, TOKENIZER, PROMPTS, WORDS), torch.tensor(wanted), atol=1e-4)
    prompts, words = [row["prompt"] for row in ROWS], MOOD.labels or ()
    expected = [
        max(range(3), key=lambda k: mean_log(model, TOKENIZER(p.rstrip())["input_ids"], TOKENIZER(
            f" {words[k]}", add_special_tokens=False)["input_ids"]))
        for p in prompts
    ]  # fmt: skip
    assert likeliest(model, TOKENIZER, prompts, words, batch_size=4, max_length=64) == expected
    assert 0 <= score(model, TOKENIZER, ROWS, MOOD) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["A day. Answer: ", "Answer:\n", "Answer:"])
def test_label_words_are_what_the_joined_text_gives(kind: str, prompt: str) -> None:
    model, tokens = llama(initializer_range=0.3), KINDS[kind]()
    closing = [token for token in (tokens.eos_token_id, tokens.sep_token_id) if token is not None]

    def read(text: str) -> list[int]:
        return [i for i in tokens(text)["input_ids"] if i not in closing]

    joined, n = [read(prompt + word) for word in ("yes", "no", "bread")], 0
    alone = read(prompt.rstrip(" "))
    while n < len(alone) and all(ids[n] == alone[n] for ids in joined):
        n += 1
    means = [mean_log(model, ids[:n], ids[n:]) for ids in joined]
    found = likeliest(model, tokens, [prompt], ("yes", "no", "bread"), batch_size=1, max_length=64)
    assert found == [means.index(max(means))]


def test_a_label_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the label '\\u200b' has no token"):
        likeliest(llama(), like_bert(), ["Answer:"], ("yes", "\u200b"), batch_size=1, max_length=64)


@pytest.mark.parametrize(("name", "wrong"), [("batch_size", 0), ("batch_size", -1), ("max_length", 0)])
def test_a_count_below_one_is_refused(name: str, wrong: int) -> None:
    settings = {"batch_size": 1, "max_length": 64, name: wrong}
    with pytest.raises(ValueError, match=f"^{name}={wrong}, expected a whole number of at least 1"):
        likeliest(llama(), TOKENIZER, ["Answer:"], (" yes", " no"), **settings)


def test_words_that_leave_a_prompt_no_room_are_refused() -> None:
    words = (" yes", " the good bread")
    longest = len(TOKENIZER(words[1], add_special_tokens=False)["input_ids"])
    assert longest > 1
    for length in (1, longest):
        with pytest.raises(ValueError, match=rf"max_length={length}, .*' the good bread' takes {longest} tokens; "
                           rf"expected at least {longest + 1}"):  # fmt: skip
            likeliest(llama(), TOKENIZER, ["The baker:"], words, batch_size=1, max_length=length)
    model, last = llama(initializer_range=0.3), TOKENIZER("The baker:")["input_ids"][-1:]
    means = [mean_log(model, last, TOKENIZER(word, add_special_tokens=False)["input_ids"]) for word in words]
    found = likeliest(model, TOKENIZER, ["The baker:"], words, batch_size=1, max_length=longest + 1)
    assert found == [means.index(max(means))]
