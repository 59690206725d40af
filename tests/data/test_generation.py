"""generate: greedy answers, the same in any batch, up to any end."""

from typing import Any

import pytest
import torch

from pefttutor.data.generation import generate
from pefttutor.data.scoring import score
from tests.data.moods import MOOD, ROWS, TOKENIZER
from tests.data.unusual import speaker
from tests.tiny import llama, tokenizer


def test_generate_is_greedy_and_the_same_in_any_batch() -> None:
    model = llama(initializer_range=0.2)
    prompts = [row["prompt"] for row in ROWS]
    together = generate(model, TOKENIZER, prompts, max_new_tokens=6, batch_size=6)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([TOKENIZER(prompt.rstrip())["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):  # without a cache, without padding
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == TOKENIZER.eos_token_id:
                    break
        assert answer == TOKENIZER.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, TOKENIZER, prompts, max_new_tokens=6, batch_size=2) == together


@pytest.mark.parametrize("family", ["gpt2", "bart", "bloom", "mamba", "bamba"])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(family: str) -> None:
    model, prompts = speaker(family), [row["prompt"] for row in ROWS]
    alone = [generate(model, TOKENIZER, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert generate(model, TOKENIZER, prompts, max_new_tokens=5) == alone


def test_every_end_token_of_the_model_ends_an_answer() -> None:
    model = llama(initializer_range=0.2)
    whole = generate(model, TOKENIZER, ["The baker", "Say day:"], max_new_tokens=8)
    said = TOKENIZER(whole[0], add_special_tokens=False)["input_ids"]
    ends = said[3]
    model.generation_config.eos_token_id = [2, ends]
    stopped = generate(model, TOKENIZER, ["The baker", "Say day:"], max_new_tokens=8)
    assert stopped[0] == TOKENIZER.decode(said[: said.index(ends)])
    model.generation_config.eos_token_id = ends
    assert generate(model, TOKENIZER, ["The baker", "Say day:"], max_new_tokens=8) == stopped


def test_greedy_is_greedy_whatever_the_model_brings_along() -> None:
    model, prompts = llama(initializer_range=0.2), [row["prompt"] for row in ROWS]
    expected = generate(model, TOKENIZER, prompts, max_new_tokens=8)
    own = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
        "do_sample": True,
        "top_k": 5,
    }
    model.generation_config.update(**own)
    assert generate(model, TOKENIZER, prompts, max_new_tokens=8) == expected
    assert {key: getattr(model.generation_config, key) for key in own} == own


@pytest.mark.parametrize("pad", [None, -1])
def test_an_answer_that_ends_early_is_not_filled_up_with_words(pad: int | None) -> None:
    model = llama(initializer_range=0.2, pad_token_id=None)
    prompts = [row["prompt"] for row in ROWS]
    expected = generate(model, TOKENIZER, prompts, max_new_tokens=8)
    assert len({len(TOKENIZER(text)["input_ids"]) for text in expected}) > 1
    model.generation_config.eos_token_id = TOKENIZER(expected[0])["input_ids"][2]
    expected = [generate(model, TOKENIZER, [prompt], max_new_tokens=8)[0] for prompt in prompts]

    class Unpadded:
        """The same words; which token fills up isn't known, or −1."""

        pad_token_id = pad

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, *args: Any, **settings: Any) -> Any:
            return TOKENIZER(*args, **settings)

    assert generate(model, Unpadded(), prompts, max_new_tokens=8) == expected
    model.config.pad_token_id = pad
    assert 0 <= score(model, Unpadded(), ROWS, MOOD) <= 1


@pytest.mark.parametrize("begins", [True, False])
def test_an_empty_prompt(begins: bool) -> None:
    from tokenizers import processors

    words = tokenizer()
    if not begins:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        words.bos_token = None
    model = llama(initializer_range=0.2)
    start = 1 if begins else 2  # <s>, or else </s>
    with torch.no_grad():
        first = model(torch.tensor([[start]])).logits[0, -1].argmax()
    assert generate(model, words, [""], max_new_tokens=1) == [words.decode([first], skip_special_tokens=True)]
    rows = [{"prompt": "", "label": 0}, {"prompt": "A day", "label": 1}]
    assert 0 <= score(model, words, rows, MOOD) <= 1
    words.eos_token = words.bos_token = None
    if not begins:
        with pytest.raises(
            ValueError, match="a prompt is empty, and the tokenizer has neither bos_token nor eos_token"
        ):
            generate(model, words, [""], max_new_tokens=1)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens", "batch_size"])
def test_a_count_below_one_is_refused(name: str, wrong: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 2, name: wrong}
    with pytest.raises(ValueError, match=f"^{name}={wrong}, expected a whole number of at least 1"):
        generate(llama(), TOKENIZER, ["The baker", "A day"], **settings)
