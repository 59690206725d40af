"""Prompt tuning: virtual tokens before a text, held against HF PEFT's, row by row where it knows no padding there."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

import pefttutor as pt
from pefttutor import PromptTuning
from tests.cases import answer, gradients, logits_of, moved
from tests.pictures import differences, picture
from tests.tiny import made, tiny_batch, tiny_config, tiny_model

P, WIDTH = 5, 24
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "tagger": "TOKEN_CLS"}


def base(kind: str) -> nn.Module:
    if kind == "tagger":
        return made(hf.BertForTokenClassification, tiny_config("bert"), spread=True)
    return tiny_model(kind)


def adapted(kind: str, **settings: object) -> nn.Module:
    return moved(PromptTuning(num_virtual_tokens=P, **settings).attach(base(kind)))


def prompt_of(model: nn.Module) -> nn.Parameter:
    return next(p for p in model.parameters() if p.requires_grad)


def peers(kind: str) -> tuple[nn.Module, nn.Module]:
    """Ours and HF PEFT's model with the same prompt, in which the whole base gets gradients too."""
    ours = adapted(kind)
    config = peft.PromptTuningConfig(
        task_type=TASKS[kind], num_virtual_tokens=P, token_dim=WIDTH, num_transformer_submodules=1, num_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    theirs = peft.get_peft_model(base(kind), config).eval()
    theirs.prompt_encoder.default.embedding.weight.data.copy_(prompt_of(ours).data)
    for p in (*ours.parameters(), *theirs.base_model.parameters()):
        p.requires_grad_(True)
    return ours, theirs


def theirs_by_our_names(found: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    where = {"llama": "model", "gpt2": "transformer", "t5": "encoder", "tagger": "bert"}[kind]
    names = {"prompt_encoder.default.embedding.weight": f"{where}.prompt"}
    plain = {
        name.removeprefix("base_model.").replace("modules_to_save.default.", ""): g
        for name, g in found.items()
    }
    return {names.get(name, name): g for name, g in plain.items()}


def batch_of(kind: str, side: str = "right") -> dict[str, torch.Tensor]:
    batch = tiny_batch("bert" if kind == "tagger" else kind, side=side)
    if kind == "tagger":
        batch["labels"] = batch["input_ids"].remainder(3).masked_fill(batch["attention_mask"] == 0, -100)
    elif kind != "t5":
        batch["labels"][:, 0] = -100  # HF PEFT lets the last virtual token predict the text's first
    return batch


@pytest.mark.parametrize("kind", TASKS)
def test_outputs_and_every_gradient_are_those_of_hf_peft(kind):
    (ours, theirs), batch = peers(kind), batch_of(kind)
    mine, labels = ours(**batch), batch["labels"]
    if kind == "tagger":  # whose labels HF PEFT leaves as they are, and then fails
        logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, P:].flatten(0, 1), labels.flatten())
    else:
        other = theirs(**batch)
        logits, loss = other.logits, other.loss
    torch.testing.assert_close(mine.logits, logits[:, -labels.shape[1] :])
    torch.testing.assert_close(mine.loss, loss)
    expected = theirs_by_our_names(gradients(theirs, loss), kind)
    found = gradients(ours, mine.loss)
    assert set(found) == set(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tagger"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_text_is_the_text_alone_on_either_side(kind, side):
    """The virtual tokens stand right before it: HF PEFT's, which puts them before the padding, is asked row by row."""
    (ours, theirs), batch = peers(kind), batch_of(kind, side)
    real = batch["attention_mask"].bool()
    # Rotary positions are relative: nothing may come between the virtual tokens and the text.
    positions = {"position_ids": (real.long().cumsum(1) - 1).clamp(min=0)} if kind != "llama" else {}
    said = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **positions).logits[
        real
    ]
    rows = [
        theirs(input_ids=ids[mask][None]).logits[0, P:]
        for ids, mask in zip(batch["input_ids"], real, strict=True)
    ]
    expected = torch.cat(rows)
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 1, said.numel()).view_as(said)
    torch.testing.assert_close(
        gradients(ours, (said * weights).sum()),
        theirs_by_our_names(gradients(theirs, (expected * weights).sum()), kind),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_an_encoders_pooled_token_is_the_texts_own_first_one():
    model, batch = adapted("bert"), tiny_batch("bert")
    body, kinds = copy.deepcopy(model.bert), torch.arange(9).ge(4).long().expand(3, 9)
    pt_rows = prompt_of(model)
    plain = tiny_model("bert").bert
    with torch.no_grad():
        words = torch.cat(
            [pt_rows.expand(3, -1, -1), plain.embeddings.word_embeddings(batch["input_ids"])], 1
        )
        mask = torch.cat([torch.ones(3, P).long(), batch["attention_mask"]], 1)
        both = torch.cat([torch.zeros(3, P).long(), kinds], 1)  # virtual tokens are of the first text
        states = plain(inputs_embeds=words, attention_mask=mask, token_type_ids=both).last_hidden_state
        found = body(batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=kinds)
        torch.testing.assert_close(found.last_hidden_state, states[:, P:])
        torch.testing.assert_close(found.pooler_output, plain.pooler(states[:, P:]))


def test_where_positions_come_from_the_ids_padding_on_the_left_counts_for_nothing():
    """RoBERTa numbers the tokens that aren't padding; embeddings alone wouldn't tell which these are."""
    config = hf.RobertaConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        num_labels=3,
    )
    model, ids, said = made(hf.RobertaForTokenClassification, config), tiny_batch("llama")["input_ids"], []
    moved(PromptTuning(num_virtual_tokens=3).attach(model))
    ids = ids.masked_fill(ids == 0, config.pad_token_id)
    for rows in (
        ids,
        torch.stack([row.roll(int((row == 1).sum())) for row in ids]),
    ):  # padding on the right, and left
        mask = (rows != config.pad_token_id).long()
        said.append(answer(model, {"input_ids": rows, "attention_mask": mask})[mask.bool()])
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-5)


# ---- caches


def cache_of(output) -> dict[str, object]:
    """The cache that a call has filled, by the name that this transformers has for it."""
    key = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118 (`in` knows old names too)
    return {key: output[key]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", [1, 8])
def test_a_text_in_two_parts_with_a_cache_is_the_text_in_one(kind, cut):
    model, ids = adapted(kind), tiny_batch(kind)["input_ids"][:1]
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :cut], use_cache=True)
        second = model(ids[:, cut:], **cache_of(first)).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generating_with_a_cache_says_the_same_as_without(kind, how):
    model, said, batch = adapted(kind), [], tiny_batch(kind, side="left")
    for use_cache in (True, False):
        torch.manual_seed(0)
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        said.append(model.generate(**prompt, use_cache=use_cache, max_new_tokens=5, min_new_tokens=5, **how))
    assert torch.equal(*said)
    assert not torch.equal(said[0], base(kind).generate(**prompt, max_new_tokens=5, min_new_tokens=5))


def test_a_cache_that_was_filled_otherwise_is_refused():
    model, plain, ids = adapted("llama"), base("llama"), torch.tensor([[3, 7, 8, 4]])
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"filled without the virtual tokens.*with the adapted model too"
        ):
            model(ids, **cache_of(plain(ids, use_cache=True)))
        with pytest.raises(
            ValueError, match=r"holds 9 tokens, virtual ones among them, 4 more.*mask is \(1, 7\)"
        ):
            model(ids, attention_mask=torch.ones(1, 7).long(), **cache_of(model(ids, use_cache=True)))
        written = model.generate(
            ids, max_new_tokens=P - 1, min_new_tokens=P - 1, return_dict_in_generate=True
        )
        length = (
            r"(position_ids begin at 3|the mask is \(1, 9\))"  # by what generate tells it, newer or older
        )
        with pytest.raises(ValueError, match=rf"12 tokens.*6 more.*{length}: .* without a cache"):
            model.generate(
                torch.cat([written.sequences, ids[:, :1]], 1), **cache_of(written), max_new_tokens=2
            )


# ---- several side by side


def test_two_prompts_are_one_after_the_other_and_can_be_switched():
    model = base("gpt2")
    for seed, name in enumerate(("german", "bank")):
        PromptTuning(num_virtual_tokens=2 + seed, init="random", init_seed=seed).attach(model, name=name)
    batch = tiny_batch("gpt2", side="left") | {"position_ids": torch.arange(9).expand(3, 9)}
    rows = [model.transformer.get_parameter(f"prompt@{name}").detach() for name in ("german", "bank")]
    for active in (("german", "bank"), ("bank",), ("bank", "german")):
        pt.switch(model, *active)
        # Switched on again, "german" is the first as before.
        chosen = [row for row, name in zip(rows, ("german", "bank"), strict=True) if name in active]
        one = PromptTuning(num_virtual_tokens=sum(map(len, chosen))).attach(base("gpt2"), torch.cat(chosen))
        torch.testing.assert_close(answer(model, batch), answer(one, batch))


# ---- what goes in


def test_embeddings_as_input_are_read_as_the_words_they_stand_for():
    model, batch = adapted("llama"), tiny_batch("llama")
    words = model.get_input_embeddings()(batch["input_ids"])
    found = answer(model, {"inputs_embeds": words, "attention_mask": batch["attention_mask"]})
    expected = answer(model, {key: batch[key] for key in ("input_ids", "attention_mask")})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"attention_mask": torch.ones(3, 1, 9, 9)},
            r"what they have of attention_mask, Tensor \(3, 1, 9, 9\); expect",
        ),
        ({"word_kinds": torch.ones(3, 9).long()}, r"what they have of word_kinds, Tensor \(3, 9\)"),
        (
            {"attention_mask": torch.ones(3, 8).long()},
            r"attention_mask is \(3, 8\), expected \(3, 9\): one for each",
        ),
    ],
)
def test_an_argument_that_virtual_tokens_have_no_part_in_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        adapted("llama")(tiny_batch("llama")["input_ids"], **more)


def test_hidden_states_are_those_of_the_text():
    output = adapted("gpt2")(tiny_batch("gpt2")["input_ids"], output_hidden_states=True)
    assert {tuple(states.shape) for states in output.hidden_states} == {(3, 9, WIDTH)}


# ---- where it starts


def rows_at_start(start: object = None, **settings: object) -> torch.Tensor:
    model = PromptTuning(**{"num_virtual_tokens": P} | settings).attach(base("llama"), start)
    return prompt_of(model).detach()


def test_rows_start_as_words_as_the_mean_of_several_or_as_another_prompt():
    table = base("llama").model.embed_tokens.weight
    rows = rows_at_start([7, [8, 9, 10]])
    torch.testing.assert_close(rows[:2], torch.stack([table[7], table[8:11].mean(0)]))
    assert all((row == table).all(1).any() for row in rows[2:])  # the others are words, too
    other = torch.randn(3, WIDTH)
    assert torch.equal(rows_at_start(other)[:3], other)
    assert torch.equal(rows_at_start(torch.tensor([7, 8]))[:2], table[7:9])


def test_drawn_rows_are_different_ordinary_words_or_uniform():
    table = base("llama").model.embed_tokens.weight
    words = (rows_at_start(num_virtual_tokens=94)[:, None] == table).all(2).nonzero()[:, 1]
    assert sorted(words.tolist()) == list(range(3, 97))  # all but padding, start and end, each once
    assert len(rows_at_start(num_virtual_tokens=200)) == 200
    drawn = rows_at_start(init="random", num_virtual_tokens=200)
    assert -0.5 <= drawn.min() < -0.45
    assert 0.45 < drawn.max() < 0.5
    assert not torch.equal(drawn, rows_at_start(init="random", num_virtual_tokens=200, init_seed=1))


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (torch.ones(6, 1, dtype=torch.int64), r"start is a tensor \(6, 1\) of torch.int64; .*at most 5 rows"),
        ([3] * 6, "start is .*at most 5 rows, such as tokenizer"),
        ([97], "expected token ids below 97"),
        ("yes", "expected token ids"),
        ([[]], "expected token ids"),
        ([1.5], "expected token ids"),
        (torch.ones(2, 7), r"start is \(2, 7\), expected at most \(5, 24\)"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, says):
    model = base("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        PromptTuning(num_virtual_tokens=P).attach(model, start)
    assert differences(before, picture(model)) == []


def test_more_virtual_tokens_than_positions_are_refused():
    model = base("gpt2")
    before = picture(model)
    with pytest.raises(
        ValueError, match="num_virtual_tokens is 32, and this model has positions for 32 tokens"
    ):
        PromptTuning(num_virtual_tokens=32).attach(model)
    assert differences(before, picture(model)) == []


def test_the_published_count():
    """Lester et al. 2021, section 1: 20,480 values a task, 5 tokens for T5 XXL."""
    with torch.device("meta"):
        model = hf.T5ForConditionalGeneration(hf.T5Config(d_model=4096, num_layers=1, vocab_size=32128))
    method = PromptTuning(num_virtual_tokens=5)
    assert method.count(model) == 20_480


def test_a_router_is_asked_about_the_texts_own_tokens():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = hf.Qwen2MoeConfig(
        vocab_size=97, intermediate_size=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, output_router_logits=True, **sizes,
    )  # fmt: skip
    model = PromptTuning(num_virtual_tokens=3).attach(made(hf.Qwen2MoeForCausalLM, config))
    output = model(**tiny_batch("llama"))
    assert {tuple(each.shape) for each in output.router_logits} == {(27, 4)}
    assert output.aux_loss.isfinite()
    assert logits_of(model, tiny_batch("llama")).shape == (3, 9, 97)
