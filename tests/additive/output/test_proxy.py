"""Proxy-tuning against its formula, computed from three plain models: logits, losses, every way of generating."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

import pefttutor
from pefttutor import LoRA, ProxyTuning, attached, detach, memory, switch
from pefttutor.memory.meta import on_meta
from pefttutor.method import find
from pefttutor.parts.streams import CACHES
from tests.cases import answer, batch_of, gradients, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ALPHA = 0.7
FAMILIES = ("llama", "gpt2", "bloom", "qwen3")


def three(kind: str, other: str | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """A model, and an expert and an anti-expert that are smaller, of the same or another architecture."""
    small = {"width": 16, "layers": 1, **changes}
    return tiny_model(kind, **changes), *(tiny_model(other or kind, seed=i, **small) for i in (5, 6))


def formula(models: Any, inputs: dict[str, Tensor], alpha: float = ALPHA) -> Tensor:
    s, plus, minus = (answer(model, inputs) for model in models)
    return s + alpha * (plus - minus)


def prompts(side: str = "left") -> dict[str, Tensor]:
    batch = batch_of("llama", side)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def steered(models: Any, alpha: float = ALPHA) -> Any:
    model, expert, anti = models
    return ProxyTuning(alpha=alpha).attach(copy.deepcopy(model), expert, anti)


# ---- logits and losses


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("kind", "other"), [*((k, k) for k in FAMILIES), ("llama", "gpt2"), ("gpt2", "qwen3")]
)
def test_the_logits_are_those_of_the_formula(kind, other, side):
    models = three(kind, other)
    torch.testing.assert_close(
        answer(steered(models), prompts(side)), formula(models, prompts(side)), **CLOSE
    )


def test_it_is_the_product_of_experts():
    models = three("llama")
    p, plus, minus = (answer(model, prompts()).softmax(-1) for model in models)
    product = p * (plus / minus) ** ALPHA
    found = answer(steered(models), prompts()).softmax(-1)
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True), **CLOSE)


def test_an_expert_that_has_learned_nothing_and_a_strength_of_zero_change_no_bit():
    model, expert, anti = three("llama")
    expected = answer(model, prompts())
    assert torch.equal(answer(steered((model, expert, copy.deepcopy(expert))), prompts()), expected)
    assert torch.equal(answer(steered((model, expert, anti), alpha=0.0), prompts()), expected)


@pytest.mark.parametrize("itself", [True, False])
def test_beside_its_own_anti_expert_a_model_says_what_the_expert_says(itself):
    """M = M⁻: the model itself may be given, and is run once."""
    model, expert, _ = three("gpt2")
    anti = model if itself else copy.deepcopy(model)
    calls = []
    model.transformer.register_forward_hook(lambda *call: calls.append(1))
    ProxyTuning().attach(model, expert, anti)
    torch.testing.assert_close(answer(model, prompts()), answer(expert, prompts()), **CLOSE)
    assert len(calls) == 1
    twin = copy.deepcopy(model)
    torch.testing.assert_close(answer(twin, prompts()), answer(expert, prompts()), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_labels_the_loss_is_that_of_the_steered_logits(kind):
    models, inputs = three(kind), batch_of(kind)
    logits = formula(models, {key: inputs[key] for key in ("input_ids", "attention_mask")})
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )
    model = steered(models)
    torch.testing.assert_close(model(**inputs).loss, expected, **CLOSE)
    torch.testing.assert_close(pefttutor.train.losses.causal_lm_loss(model, inputs), expected, **CLOSE)


def test_a_loss_divided_by_the_trainers_number_of_tokens_is_that_of_the_steered_logits():
    model, inputs = steered(three("llama")), batch_of("llama")
    count = (inputs["labels"][:, 1:] != -100).sum()
    expected = model(**inputs).loss / 2
    torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count).loss, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_arguments_without_a_name_are_those_of_the_models_own_signature(kind):
    """The second one is the mask of a Llama, and the cache of a GPT-2."""
    models, inputs = three(kind), prompts() | {"position_ids": torch.arange(9).expand(3, 9) * 2}
    order = list(inspect.signature(models[0].forward).parameters)
    last = max(order.index(key) for key in inputs)
    given = [inputs.get(key) for key in order[: last + 1]]
    torch.testing.assert_close(steered(models)(*given).logits.detach(), formula(models, inputs), **CLOSE)


def test_a_loss_of_more_than_the_logits_is_refused():
    config = hf.MixtralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=1.0,
    )  # fmt: skip
    model = steered((hf.MixtralForCausalLM(config).eval(), *three("llama")[1:]))
    with pytest.raises(ValueError, match=r"isn't one of its logits and labels alone.*leave labels out"):
        model(**batch_of("llama"))
    assert answer(model, prompts()).shape == (3, 9, 97)


def test_what_trains_beneath_gets_the_gradient_of_the_steered_loss():
    model, expert, anti = three("llama")
    inputs, lora = batch_of("llama"), LoRA(r=2)
    alone = moved(lora.attach(copy.deepcopy(model)))
    shift = ALPHA * (answer(expert, prompts("right")) - answer(anti, prompts("right")))
    logits = alone(**prompts("right")).logits + shift
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)
    expected = gradients(alone, loss)
    both = moved(lora.attach(copy.deepcopy(model)))
    ProxyTuning(alpha=ALPHA).attach(both, expert, anti, name="steered")
    found = gradients(both, both(**inputs).loss)
    assert set(found) == set(expected) == set(pefttutor.trainable(both))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(p.grad is None for other in (expert, anti) for p in other.parameters())


# ---- generating

NEW = 5
HOW = {"min_new_tokens": NEW, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
HOW |= {"output_logits": True, "pad_token_id": 0}


def step_by_step(models: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Greedy, without any cache: each token from the formula over the whole text."""
    ids, mask, said = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(NEW):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask}
        own = [
            given | ({} if model.config.model_type == "bloom" else {"position_ids": places})
            for model in models
        ]
        s, plus, minus = (answer(model, one)[:, -1] for model, one in zip(models, own, strict=True))
        said.append(s + ALPHA * (plus - minus))
        chosen = said[-1].index_fill(1, torch.tensor([2]), -torch.inf)  # no end before the last token
        ids = torch.cat([ids, chosen.argmax(1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, said


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("kind", "other"), [*((k, k) for k in FAMILIES), ("llama", "gpt2"), ("gpt2", "bloom"), ("bloom", "gpt2")]
)
def test_greedy_generation_says_what_the_formula_says_step_by_step(kind, other, use_cache):
    models = three(kind, other)
    ids, said = step_by_step(models, prompts())
    found = steered(models).generate(**prompts(), **HOW, do_sample=False, use_cache=use_cache)
    assert torch.equal(found.sequences, ids)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(said), **CLOSE)
    if use_cache:
        processor = ProxyTuning(alpha=ALPHA).processor(*models[1:])
        found = models[0].generate(**prompts(), **HOW, do_sample=False, logits_processor=[processor])
        assert torch.equal(found.sequences, ids)


def by_formula(expert: Any, anti: Any, mask: Tensor) -> Any:
    """A processor without caches, for a model that generates from these prompts in beams."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        rows = mask.repeat_interleave(len(ids) // len(mask), 0)
        full = F.pad(rows, (0, ids.shape[1] - rows.shape[1]), value=1)
        inputs = {"input_ids": ids, "attention_mask": full, "position_ids": (full.cumsum(1) - 1).clamp(min=0)}
        plus, minus = (answer(other, inputs)[:, -1] for other in (expert, anti))
        return (scores + ALPHA * (plus - minus)).log_softmax(-1)

    return process


@pytest.mark.parametrize(("kind", "other"), [("llama", "llama"), ("gpt2", "gpt2"), ("llama", "gpt2")])
def test_beams_are_those_of_the_formula(kind, other):
    models, inputs = three(kind, other), prompts()
    models[
        0
    ].generation_config.eos_token_id = None  # a processor doesn't see how likely a forbidden token was
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    how = {key: value for key, value in HOW.items() if key != "min_new_tokens"}
    expected = models[0].generate(
        **inputs, **how, **beams, logits_processor=[by_formula(*models[1:], inputs["attention_mask"])]
    )
    assert expected.beam_indices.diff(dim=1).ne(0).any(), "beams that never change places would prove nothing"
    processor = ProxyTuning(alpha=ALPHA).processor(*models[1:], attention_mask=inputs["attention_mask"])
    for model, more in ((steered(models), {}), (models[0], {"logits_processor": [processor]})):
        found = model.generate(**inputs, **how, **beams, **more)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **CLOSE)


@pytest.mark.parametrize("attach", [True, False])
def test_temperature_and_top_p_act_on_the_sum(attach):
    models, inputs = three("llama"), prompts()
    wanted = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 0}
    processor = [] if attach else [ProxyTuning(alpha=ALPHA).processor(*models[1:])]
    model = steered(models) if attach else models[0]
    found = model.generate(**inputs, **HOW, **wanted, logits_processor=processor).scores[0]
    scores = formula(
        models, inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    )[:, -1]
    scores = scores.index_fill(1, torch.tensor([2]), -torch.inf)
    for warper in (hf.TemperatureLogitsWarper(0.5), hf.TopPLogitsWarper(0.8)):
        scores = warper(inputs["input_ids"], scores)
    assert torch.equal(found.isinf(), scores.isinf())
    torch.testing.assert_close(found.softmax(-1), scores.softmax(-1), **CLOSE)


def test_a_processor_begins_anew_with_a_text_that_does_not_go_on():
    _, expert, anti = three("llama")
    processor, ids = ProxyTuning(alpha=ALPHA).processor(expert, anti), prompts()["input_ids"]
    longer = F.pad(ids - (ids > 5).long(), (0, 1), value=7)  # other words, and one more
    mask = (longer != 0).long()
    for text in (ids, longer):
        fresh = ProxyTuning(alpha=ALPHA).processor(expert, anti)
        scores = torch.zeros(3, 97)
        assert torch.equal(processor(text, scores), fresh(text, scores))
    expected = by_formula(expert, anti, mask)(longer, scores)
    torch.testing.assert_close(processor(longer, scores), expected, **CLOSE)


def test_a_mask_that_is_not_the_prompts_own_is_refused():
    _, expert, anti = three("llama")
    processor = ProxyTuning().processor(expert, anti, attention_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 9\) and the texts are \(3, 9\)"):
        processor(prompts()["input_ids"], torch.zeros(3, 97))


def test_a_processor_whose_mask_is_longer_than_the_texts_is_refused():
    """It was made for another call of `generate`, whose prompts were longer."""
    _, expert, anti = three("llama")
    processor = ProxyTuning().processor(expert, anti, attention_mask=prompts()["attention_mask"])
    processor(prompts()["input_ids"], torch.zeros(3, 97))
    with pytest.raises(
        ValueError, match=r"\(3, 9\) and the texts are \(3, 5\).*a new processor for each call"
    ):
        processor(prompts()["input_ids"][:, 4:], torch.zeros(3, 97))


# ---- caches


def test_a_prompt_that_was_steered_is_gone_on_from_more_than_once():
    models = three("llama")
    model, ids = steered(models), batch_of("llama")["input_ids"][:1]
    expected = formula(models, {"input_ids": ids})
    output = model(ids[:, :5])
    name = next(key for key in CACHES if key in inspect.signature(model.forward).parameters)
    cache = next(getattr(output, key) for key in CACHES if hasattr(output, key))
    for begun in (copy.deepcopy(cache), cache):
        found = model(ids[:, 5:], **{name: begun}).logits
        torch.testing.assert_close(found.detach(), expected[:, 5:], **CLOSE)
    cache.crop(-2)
    again = model(ids[:, 7:], **{name: cache}).logits
    torch.testing.assert_close(again.detach(), expected[:, 7:], **CLOSE)


def test_the_others_follow_when_the_rows_of_a_cache_are_repeated_and_chosen():
    models = three("llama")
    model, ids = steered(models), batch_of("llama")["input_ids"][:2, :7]
    rows = [0, 0, 1, 1]
    expected = formula(models, {"input_ids": ids[rows][[3, 0]]})
    name = next(key for key in CACHES if key in inspect.signature(model.forward).parameters)
    output = model(ids[:, :5])
    cache = next(getattr(output, key) for key in CACHES if hasattr(output, key))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    found = model(ids[rows][[3, 0]][:, 5:], **{name: cache}).logits
    torch.testing.assert_close(found.detach(), expected[:, 5:], **CLOSE)


def test_a_cache_that_was_filled_without_it_is_refused():
    models = three("llama")
    output = models[0](torch.tensor([[5, 6]]))
    name = next(key for key in CACHES if key in inspect.signature(models[0].forward).parameters)
    cache = next(getattr(output, key) for key in CACHES if hasattr(output, key))
    model = steered(models)
    with pytest.raises(ValueError, match="this cache was filled without it"):
        model(torch.tensor([[7]]), **{name: cache})


def test_two_act_one_after_the_other_with_caches_of_their_own():
    models = three("llama")
    more = three("llama", layers=2)[1:]
    model = steered(models)
    ProxyTuning(alpha=-0.4).attach(model, *more, name="less")
    expected = formula(models, prompts()) - 0.4 * (answer(more[0], prompts()) - answer(more[1], prompts()))
    torch.testing.assert_close(answer(model, prompts()), expected, **CLOSE)
    texts = [
        model.generate(**prompts(), **HOW, do_sample=False, use_cache=use_cache).sequences
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    torch.testing.assert_close(
        answer(switch(model, "default"), prompts()), formula(models, prompts()), **CLOSE
    )


# ---- what is left alone


def test_all_three_are_left_as_they_are():
    model, expert, anti = three("llama", dropout=0.5)
    expert.train()
    before = [picture(one) for one in (model, expert, anti)]
    expected = formula((model, copy.deepcopy(expert).eval(), anti), prompts())
    ProxyTuning(alpha=ALPHA).attach(model, expert, anti)
    torch.testing.assert_close(answer(model, prompts()), expected, **CLOSE)
    model.generate(**prompts(), max_new_tokens=3, do_sample=False)
    detach(model)
    model.generation_config = copy.deepcopy(expert.generation_config)
    assert [differences(b, picture(one)) for b, one in zip(before, (model, expert, anti), strict=True)] == [
        []
    ] * 3


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_experts_of_its_own(way):
    models = three("gpt2")
    model = steered(models)
    twin = way(model)
    expected = answer(twin, prompts())
    models[1].lm_head.weight.data.mul_(2)
    assert torch.equal(answer(twin, prompts()), expected)
    assert not torch.equal(answer(model, prompts()), expected)
    assert differences(tensors(models[0]), tensors(twin)) == []


def test_the_estimate_of_a_step_is_that_of_the_model_alone():
    models = three("llama")
    plain, model = copy.deepcopy(models[0]), steered(models)
    assert memory.estimate(model, batch_size=2, sequence_length=8).weights == sum(
        4 * p.numel() for p in plain.parameters()
    )
    assert ProxyTuning().count(model) == 0
    beside = [t for part in find(on_meta(model)).parts for t in part.kept_aside()]
    assert len(beside) > 20
    assert all(t.is_meta for t in beside), "a large expert would be copied"
    assert all(p.device.type == "cpu" for other in models for p in other.parameters())


def test_half_precision_is_added_up_in_single_precision():
    models = tuple(model.bfloat16() for model in three("llama"))
    s, plus, minus = (answer(model, prompts()).float() for model in models)
    found = answer(steered(models), prompts())
    assert torch.equal(found, (s + ALPHA * (plus - minus)).bfloat16())


# ---- refusals


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (lambda: (), r"needs two more models: attach\(model, expert, anti_expert\)"),
        (lambda: (tiny_model("llama"),), "needs two more models"),
        (
            lambda: (tiny_model("llama"), tiny_model("gpt2", vocabulary=98)),
            "one vocabulary; the model has 97 tokens, the expert has 97 tokens, the anti-expert has 98 tokens",
        ),
        (lambda: (tiny_model("bert"), tiny_model("llama")), "a BertForSequenceClassification isn't one"),
        (lambda: (tiny_model("llama"), tiny_model("t5")), "a T5ForConditionalGeneration has an encoder"),
    ],
)
def test_models_that_do_not_fit_are_refused_and_nothing_is_changed(others, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        ProxyTuning().attach(model, *others())
    assert differences(before, picture(model)) == []
    assert attached(model) == {}


def test_a_processor_asks_the_same_of_its_two_models():
    with pytest.raises(ValueError, match="the expert has 97 tokens, the anti-expert has 98 tokens"):
        ProxyTuning().processor(tiny_model("llama"), tiny_model("gpt2", vocabulary=98))


def test_a_call_without_named_outputs_is_refused():
    with pytest.raises(ValueError, match=r"adds to output.logits, and this call gives none"):
        steered(three("llama"))(**prompts(), return_dict=False)


@pytest.mark.parametrize("width", [16, 24])  # of one width they would be read as words, and mean others
def test_embeddings_in_the_place_of_tokens_are_refused(width):
    model, *others = three("llama", width=width) if width == 24 else three("llama")
    with pytest.raises(ValueError, match=r"inputs_embeds are the model's own.*: give input_ids"):
        steered((model, *others))(inputs_embeds=torch.ones(1, 4, 24))


def test_a_mask_that_is_made_for_a_cache_of_a_fixed_length_is_refused():
    with pytest.raises(ValueError, match="in generate leave cache_implementation out"):
        steered(three("llama")).generate(**prompts(), **HOW, cache_implementation="static")


def test_a_strength_is_a_number():
    with pytest.raises(ValueError, match="alpha is nan; it must be a number"):
        ProxyTuning(alpha=float("nan"))


@pytest.mark.parametrize("own_first", [True, False])
def test_two_proxies_add_up_unless_one_takes_the_model_for_its_own(own_first):
    """The model's logits are steered by then."""
    base, one, two, three = (tiny_model("llama", seed=seed) for seed in range(4))
    pairs = [(one, base), (two, three)]
    steered = copy.deepcopy(base)
    tokens = torch.tensor([[5, 6, 7]])
    for name, (plus, minus) in zip("ab", pairs, strict=True):
        ProxyTuning(alpha=0.5).attach(steered, plus, minus, name=name)
    s, p, m, q, n = (model(tokens).logits for model in (base, one, base, two, three))
    torch.testing.assert_close(steered(tokens).logits, s + 0.5 * (p - m) + 0.5 * (q - n), **CLOSE)
    first, second = pairs if own_first else pairs[::-1]
    ProxyTuning().attach(base, *first, name="a")
    with pytest.raises(ValueError, match="has the model itself for"):
        ProxyTuning().attach(base, *second, name="b")
    assert list(attached(base)) == ["a"]
