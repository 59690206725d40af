"""diagnose: nothing to say of what has trained, a word for each fault that is really made, and no trace left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pefttutor as pt
from pefttutor.diagnosis.table import Diagnosis, Row
from tests.cases import CANNOT, CASES, TRAINS_NOTHING, attached_to, base_of, batch_of, fresh, loss_of, stacked
from tests.data.moods import ROWS, TOKENIZER
from tests.pictures import differences, picture
from tests.tiny import TARGETS as KINDS_TARGETS
from tests.tiny import llama, rows_of, tiny_model

LEARNING = [name for name in CASES if name not in TRAINS_NOTHING]
CELLS = [(name, kind) for kind in ("llama", "net") for name in LEARNING if (name, kind) not in CANNOT]
TARGETS = ("q_proj", "v_proj")


def trained(model: nn.Module, rows: list[Any], **settings: Any) -> nn.Module:
    pt.fit(model, rows, **{"steps": 2, "batch_size": 3, "warmup": 0, **settings})
    return model


def lora(kind: str = "llama", **settings: Any) -> nn.Module:
    """A model on which LoRA has trained."""
    settings = {"r": 2, "target_modules": TARGETS, **settings}
    return trained(pt.LoRA(**settings).attach(tiny_model(kind)), rows_of(batch_of(kind)))


def verdicts(found: Diagnosis) -> dict[str, str]:
    """What isn't ok."""
    return {row.checked: row.verdict for row in found.rows if row.verdict != "ok"}


# ---- no false alarm, and no trace


@pytest.mark.parametrize(("name", "kind"), CELLS, ids=map("-".join, CELLS))
def test_wrong_before_training_ok_after_two_steps_and_the_model_is_as_it_was(name: str, kind: str) -> None:
    model, rows = attached_to(name, kind), rows_of(batch_of(kind))
    if name in ("ReLoRA", "COLA"):  # their merge comes with the second step, and belongs to a training
        every = {"ReLoRA": "reset_every", "COLA": "link_steps"}[name]
        model = getattr(pt, name)(r=2, target_modules=KINDS_TARGETS[kind], **{every: 2}).attach(fresh(kind))
    model.train()
    before = picture(model)
    first = pt.diagnose(model, rows)
    assert differences(before, picture(model)) == []
    several = len(pt.attached(model)) > 1  # it stands on others
    assert (first.ok, first["default: moved" if several else "moved"].verdict) == (False, "wrong")
    loss = loss_of if kind == "net" else None
    trained(model, rows, loss=loss)
    before = picture(model)
    for found in (pt.diagnose(model, rows), pt.diagnose(model), pt.diagnose(model, rows, base=base_of(kind))):
        assert found.ok, found
    assert pt.diagnose(model, stacked(rows)).ok
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("name", TRAINS_NOTHING)
def test_what_trains_nothing_is_right_as_it_is(name: str) -> None:
    model, rows = attached_to(name, "llama"), rows_of(batch_of("llama"))
    before = picture(model)
    for found in (pt.diagnose(model, rows), pt.diagnose(model), pt.diagnose(model, base=base_of("llama"))):
        assert found.ok, found
        assert "nothing of it trains" in found["moved"].found
    assert differences(before, picture(model)) == []


def test_hooks_of_others_keep_their_order() -> None:
    model = pt.PASTA(special_token_ids=(1, 2)).attach(tiny_model("llama"))
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda module, args: None)
    order = list(block._forward_pre_hooks)
    pt.diagnose(model, rows_of(batch_of("llama")))
    assert list(block._forward_pre_hooks) == order


def test_whether_a_layer_was_called_before_stays_known() -> None:
    model = pt.LoRA(target_modules=TARGETS).attach(tiny_model("llama"))
    parts = pt.attached(model)["default"].parts
    for part, called in zip(parts, (True, False, True, False), strict=True):
        part.called = called
    pt.diagnose(model, rows_of(batch_of("llama")))
    assert [part.called for part in parts] == [True, False, True, False]


# ---- each fault, made


def test_a_factor_that_has_not_moved() -> None:
    model = lora()
    model.model.layers[0].self_attn.q_proj.lora_B.data.zero_()
    found = pt.diagnose(model)
    assert verdicts(found) == {"moved": "look"}
    assert found["moved"].found.startswith(
        "still at the start: 'model.layers.0.self_attn.q_proj.lora_B' (1 of 8 tensors)"
    )
    for part in pt.attached(model)["default"].parts:
        part.factors[1].data.zero_()
    assert verdicts(pt.diagnose(model, rows_of(batch_of("llama")))) == {"moved": "look", "effect": "wrong"}


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.forgotten = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x)


FEW = [{"x": torch.tensor([1.0, i]), "labels": torch.tensor(i % 2)} for i in range(4)]


@pytest.mark.filterwarnings("ignore:.*(should train and got no gradient|can't move)")
def test_a_layer_that_is_never_called() -> None:
    model = pt.LoRA(r=1, target_modules=("called", "forgotten")).attach(Forgetful())
    found = pt.diagnose(trained(model, FEW, loss=loss_of), FEW)
    assert verdicts(found) == {"moved": "look", "called": "look"}
    assert found["moved"].advice.startswith("'forgotten' was never called")
    assert found["called"].found == "this input doesn't call 'forgotten' (1 of its 2 layers)"
    pt.attached(model)["default"].parts[1].called = True  # by other data
    assert pt.diagnose(model, FEW)["called"].verdict == "look"


@pytest.mark.filterwarnings("ignore:.*can't move")
def test_half_precision_that_cannot_move() -> None:
    model = pt.BitFit(target_modules=("called",)).attach(Forgetful().bfloat16())
    model.called.bias.data.fill_(300.0)
    pt.attached(model)["default"].parts[0].start[0].fill_(300.0)
    rows = [{**row, "x": row["x"].bfloat16()} for row in FEW]
    found = pt.diagnose(trained(model, rows, loss=loss_of, lr=1e-3), rows)
    assert (found["moved"].verdict, found["effect"].verdict) == ("wrong", "wrong")
    assert "rounded away in torch.bfloat16: keep what trains in float32" in found["moved"].advice


def test_switched_off_or_merged() -> None:
    model = pt.switch(lora())
    found = pt.diagnose(model)
    assert verdicts(found) == {"attached": "wrong", "effect": "not checked"}
    assert found["attached"].found.endswith("switched off: the model is the plain base")
    assert found["attached"].advice == "pefttutor.switch(model, 'default') to let it act"
    found = pt.diagnose(pt.merge(pt.switch(model, "default")), base=tiny_model("llama"))
    assert verdicts(found) == {"effect": "not checked"}
    assert found["attached"].found.endswith("; merged")


def test_one_that_is_off_beside_another_is_no_fault_and_rows_have_names() -> None:
    model = pt.BitFit().attach(lora(), name="bank")
    pt.switch(model, "bank")
    found = pt.diagnose(trained(model, rows_of(batch_of("llama"))))
    assert found.ok
    assert found["default: attached"].found.endswith("; switched off")
    assert found["bank: effect"].verdict == "ok"


def test_whole_parameters_that_are_switched_off_have_moved_all_the_same() -> None:
    model = pt.switch(trained(pt.BitFit().attach(tiny_model("llama")), rows_of(batch_of("llama"))))
    assert pt.diagnose(model)["moved"].verdict == "ok"


def test_a_frozen_weight_that_was_changed() -> None:
    model = lora()
    model.model.norm.weight.data[1] += 1
    found = pt.diagnose(model, base=tiny_model("llama"))
    assert verdicts(found) == {"frozen": "wrong"}
    assert found["frozen"].found == "not the base's: 'model.norm.weight' (1 of 29 tensors)"
    model.model.norm.weight.data[0] += 1  # one of the eight values that are known without a base
    found = pt.diagnose(model)
    assert verdicts(found) == {"frozen": "wrong"}
    assert found["frozen"].found == "model.norm.weight has other values (1 in all)"
    assert pt.diagnose(lora(), base=Forgetful())["frozen"].found == "base= has none of these tensors"


def test_a_base_that_nobody_has_described() -> None:
    model = lora()
    vars(model)["_pefttutor"].base = None
    assert verdicts(pt.diagnose(model)) == {"frozen": "not checked"}
    assert pt.diagnose(model)["frozen"].advice == "give base=, the model before training"
    for part in pt.attached(model)["default"].parts:
        pt.attached(model)["default"].start.update(dict.fromkeys((key for key, _ in part.saved())))
    assert pt.diagnose(model)["moved"].verdict == "not checked"


def test_nan_anywhere() -> None:
    model = lora()
    model.model.layers[1].self_attn.v_proj.lora_A.data[0, 0] = float("nan")
    found = pt.diagnose(model)
    assert found["finite"].verdict == "wrong"
    assert found["finite"].found == "NaN or infinity in 'model.layers.1.self_attn.v_proj.lora_A'"


def test_an_embedding_saved_by_accident() -> None:
    tied = {"tie_word_embeddings": True}
    method = pt.LoRA(r=2, target_modules=TARGETS, modules_to_save=("lm_head",))
    model = trained(method.attach(tiny_model("llama", **tied)), rows_of(batch_of("llama")))
    found = pt.diagnose(model)
    assert verdicts(found) == {"saved": "look"}
    assert "of which 'model.embed_tokens.weight', an embedding or tied to one, is 87%" in found["saved"].found
    head = pt.LinearProbe(modules_to_save=("lm_head",)).attach(tiny_model("llama", **tied))
    assert pt.diagnose(head)["saved"].verdict == "ok"  # it is what was asked for


def test_a_head_that_was_drawn_and_is_frozen() -> None:
    model, _ = pt.models.load("campus-nano", head="classification", num_labels=2)
    pt.LoRA(r=2).attach(model)
    found = pt.diagnose(model)
    assert found["head"].verdict == "wrong"
    assert found["head"].found == "'score.weight' was drawn at random, never trained, and is frozen"
    model.score.weight.data[0, 0] += 1  # trained once, then frozen
    assert "head" not in verdicts(pt.diagnose(model))
    model, _ = pt.models.load("campus-nano", head="classification", num_labels=2)
    pt.LoRA(r=2, modules_to_save=("score",)).attach(model)
    assert "head" not in verdicts(pt.diagnose(model))


def test_a_head_of_another_library_with_a_bias_of_zeros() -> None:
    model = lora("bert", target_modules=("query",))
    assert pt.diagnose(model).ok
    model.classifier.bias.data.zero_()
    assert pt.diagnose(model)["head"].verdict == "look"


def test_flags_that_contradict_the_attachment() -> None:
    model = lora()
    model.lm_head.weight.requires_grad_(True)
    found = pt.diagnose(model)
    assert verdicts(found) == {"flags": "wrong"}
    assert found["flags"].found == "trains, and belongs to no attachment: 'lm_head.weight'"
    assert pt.diagnose(lora().requires_grad_(False)).ok  # trained, then frozen to be used
    model = pt.LoRA(target_modules=TARGETS).attach(tiny_model("llama")).requires_grad_(False)
    assert pt.diagnose(model)["flags"].found.startswith("should train, and requires no gradient: ")


def test_a_layer_that_was_replaced() -> None:
    model = lora()
    model.model.layers[0].self_attn.q_proj = nn.Linear(24, 24).requires_grad_(False)
    found = pt.diagnose(model)
    assert verdicts(found) == {"called": "look", "saved": "wrong", "frozen": "wrong"}
    assert found["saved"].found.startswith("this model has lost 'model.layers.0.self_attn.q_proj.lora_A'")


def test_padding_that_is_learned() -> None:
    model, batch = lora(), batch_of("llama")
    batch["labels"] = batch["input_ids"]
    found = pt.diagnose(model, batch)
    assert verdicts(found) == {"labels": "wrong"}
    assert found["labels"].found == "8 labels stand on padding (attention_mask 0)"


# ---- plain models


def test_a_model_without_a_method() -> None:
    model, base, rows = fresh("net"), base_of("net"), rows_of(batch_of("net"))
    assert verdicts(pt.diagnose(model, rows)) == {"attached": "look"}
    found = pt.diagnose(model, rows, base=base)
    assert verdicts(found) == {"moved": "wrong"}
    model.enter.requires_grad_(False)
    found = pt.diagnose(trained(model, rows, loss=loss_of), rows, base=base)
    assert found.ok
    assert found["attached"].found == "no method; 16 of 18 tensors train: full fine-tuning"
    assert found["moved"].found == "16 of 16 tensors aren't the base's any more"
    model.enter.bias.data += 1
    assert verdicts(pt.diagnose(model, base=base)) == {"frozen": "wrong"}
    assert verdicts(pt.diagnose(model.requires_grad_(False), base=base)) == {"attached": "look"}


# ---- what it's asked and how it answers


def test_whether_it_stops_is_a_row_where_prompts_are_given() -> None:
    model = pt.LoRA(r=2, target_modules=TARGETS).attach(llama())
    examples = pt.data.encode(ROWS, TOKENIZER, kind="generation")
    found = pt.diagnose(model, examples, tokenizer=TOKENIZER, rows=ROWS)
    assert found["stops"].verdict == "wrong"
    assert found["stops"].found == "0 of 6 answers end within 26 tokens"
    assert "it hasn't learned to end" in found["stops"].advice


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"has no weights yet"):
        pt.diagnose(tiny_model("llama").to("meta"))
    with pytest.raises(ValueError, match="tokenizer and rows go together"):
        pt.diagnose(lora(), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"base is 'campus-nano'; expected a model: pefttutor\.models\.load"):
        pt.diagnose(lora(), base="campus-nano")
    with pytest.raises(
        ValueError, match=r"a LlamaForCausalLM can't be called with \['x'\] .*give what it was trained"
    ):
        pt.diagnose(lora(), {"x": torch.ones(1, 2)})


def test_a_model_that_takes_no_tokens_needs_examples() -> None:
    model = pt.LoRA(r=1, target_modules=("called",)).attach(Forgetful())
    assert pt.diagnose(model)["effect"].verdict == "not checked"
    assert pt.diagnose(model)["effect"].advice == "give examples= of what it was trained on"


def test_the_table_is_read_by_people_and_by_notebooks() -> None:
    found = Diagnosis((Row("moved", "<none> " * 20, "wrong", "train"), Row("finite", "all", "ok")))
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 112
    assert lines[0].startswith("moved       wrong        <none>")
    assert lines[-2:] == [" " * 25 + "→ train", "finite      ok           all"]
    assert "<td>wrong</td><td>&lt;none&gt; " in found._repr_html_()
    assert not found.ok
    assert Diagnosis((Row("frozen", "nothing", "not checked"),)).ok
