"""LST against Llama's and BERT's blocks written out in plain torch, and what autograd keeps of the model: nothing."""

import math

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from pefttutor import (
    LST,
    Adapter,
    LoRA,
    PromptTuning,
    attached,
    freeze,
    switch,
    trainable,
)
from pefttutor.additive.inside.lst import ladder_values
from pefttutor.memory.measured import watch_saved
from pefttutor.parts.blocks import blocks
from pefttutor.parts.cached_attention import cache_key
from pefttutor.parts.streams import cache_made
from tests.cases import batch_of, gradients, loss_of, moved
from tests.pictures import differences, picture
from tests.tiny import tiny_model

F64 = torch.float64
R, D, HEADS = 3, 24, 4
NARROW, WIDTH = D // R, D // R // HEADS  # of the side network, and of one of its heads


def read_by(model, batch):
    """What goes into the first block and what each block gives, of the plain model."""
    stack, found = blocks(model)[1], []
    handles = [
        stack[0].register_forward_pre_hook(lambda m, args, kwargs: found.append(args[0]), with_kwargs=True)
    ]
    handles += [b.register_forward_hook(lambda m, args, out: found.append(out)) for b in stack]
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return [each[0] if isinstance(each, tuple) else each for each in found]


def heads(x):
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def attend(q, k, v, seen):
    scores = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).masked_fill(~seen, -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def turned(x):
    """Pairs of features, half a head apart, as complex numbers times e^(i · position · 10000^(−2j/width))."""
    place = torch.arange(x.shape[2], dtype=F64)[:, None]
    angle = place * 10000 ** (-2 * torch.arange(WIDTH // 2, dtype=F64) / WIDTH)
    a, b = x.chunk(2, -1)
    y = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([y.real, y.imag], -1)


def llama_block(w, x, mask):
    n = x.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril() & mask[:, None, None, :] | torch.eye(n, dtype=torch.bool)

    def rms(x, g):
        return g * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def lin(h, name):
        return h @ w[f"{name}_weight"].t() + w.get(f"{name}_bias", 0)

    h = rms(x, w["input_layernorm_weight"])
    q, k, v = (heads(lin(h, f"self_attn_{name}_proj")) for name in "qkv")
    k, v = (each.repeat_interleave(HEADS // each.shape[1], 1) for each in (k, v))
    x = x + lin(attend(turned(q), turned(k), v, seen), "self_attn_o_proj")
    h = rms(x, w["post_attention_layernorm_weight"])
    return x + lin(F.silu(lin(h, "mlp_gate_proj")) * lin(h, "mlp_up_proj"), "mlp_down_proj")


def bert_block(w, x, mask):
    def lin(h, name):
        return h @ w[f"{name}_weight"].t() + w[f"{name}_bias"]

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return centred / scale * w[f"{name}_LayerNorm_weight"] + w[f"{name}_LayerNorm_bias"]

    q, k, v = (heads(lin(x, f"attention_self_{name}")) for name in ("query", "key", "value"))
    h = lin(attend(q, k, v, mask[:, None, None, :]), "attention_output_dense")
    x = norm(x + h, "attention_output")
    h = lin(x, "intermediate_dense")
    h = lin(h * (1 + torch.erf(h / math.sqrt(2))) / 2, "output_dense")
    return norm(x + h, "output")


BLOCK = {"llama": llama_block, "bert": bert_block}
PLACE = {"llama": ("model", "model.layers"), "bert": ("bert.encoder", "bert.encoder.layer")}


def by_hand(kind, base, leaves, batch, kept):
    """The loss by the formula, of tensors by the names they are saved under."""
    around, stack = PLACE[kind]
    h, mask = read_by(base, batch), batch["attention_mask"].bool()

    def of(place):
        start = f"{place}.lst_"
        return {name.removeprefix(start): t for name, t in leaves.items() if name.startswith(start)}

    ends = of(around)
    s = h[0] @ ends["first_weight"].t() + ends["first_bias"]
    for i in kept:
        w = of(f"{stack}.{i}")
        gate = 1 / (1 + torch.exp(-w["gate"] / 0.1))
        s = gate * s + (1 - gate) * (h[i + 1] @ w["read_weight"].t() + w["read_bias"])
        s = BLOCK[kind](w, s, mask)
    if kind == "llama":
        s = ends["norm_weight"] * s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    said = s @ ends["up_weight"].t() + ends["up_bias"]
    if kind == "bert":
        first = torch.tanh(F.linear(said[:, 0], base.bert.pooler.dense.weight, base.bert.pooler.dense.bias))
        logits = F.linear(first, base.classifier.weight, base.classifier.bias)
        return logits, F.cross_entropy(logits, batch["labels"])
    logits = said @ base.lm_head.weight.t()
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_outputs_and_every_gradient_are_those_of_the_formula(kind, layers, side):
    base, batch = freeze(tiny_model(kind, dtype=F64)), batch_of(kind, side, F64)
    model = moved(LST(reduction=R, layers=layers).attach(tiny_model(kind, dtype=F64)))
    if kind == "llama":  # what a padding token would say is nobody's
        batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    leaves = {n: t.clone().requires_grad_() for n, t in attached(model)["default"].tensors(model).items()}
    logits, loss = by_hand(kind, base, leaves, batch, layers or (0, 1))
    output = model(**batch)
    real = batch["attention_mask"].bool() if kind == "llama" else slice(None)
    near = (
        {"rtol": 1e-5, "atol": 1e-6} if kind == "llama" else {"rtol": 1e-9, "atol": 1e-9}
    )  # its norms are float32's
    torch.testing.assert_close(output.logits[real], logits[real], **near)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    torch.testing.assert_close(gradients(model, output.loss), expected, **near)
    assert all(
        g.abs().max() > 1e-6 for n, g in expected.items() if "k_proj_bias" not in n and "key_bias" not in n
    )


# ---- what autograd keeps


def kept_inside(model, batch):
    """How many tensors autograd keeps while the model's own blocks run, and what it keeps in all."""
    depth, inside, shapes = [0], [], []

    def enter(*_):
        depth[0] += 1

    def leave(*_):
        depth[0] -= 1

    def note(tensor):
        inside.append(depth[0])
        shapes.append(tuple(tensor.shape))
        return tensor

    stack = blocks(model)[1]
    handles = [block.register_forward_pre_hook(enter, prepend=True) for block in stack]
    handles += [block.register_forward_hook(leave) for block in stack]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model.train(), batch).backward()
    for handle in handles:
        handle.remove()
    return sum(map(bool, inside)), shapes


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_autograd_keeps_nothing_of_what_the_models_blocks_compute(kind):
    batch = batch_of(kind)
    inside, shapes = kept_inside(LST(reduction=R).attach(tiny_model(kind)), batch)
    assert inside == 0
    wide = tuple(batch["input_ids"].shape)
    assert shapes.count((*wide, D)) + shapes.count((wide[0] * wide[1], D)) == 3  # h₀, h₁ and h₂, for their D
    targets = ("q_proj",) if kind == "llama" else ("query",)
    inside, _ = kept_inside(LoRA(r=1, target_modules=targets).attach(tiny_model(kind)), batch)
    assert inside > 40


def test_it_keeps_a_small_part_of_what_others_keep():
    """Of a BERT with 4 blocks of width 96: LoRA and adapters still pass through all blocks."""
    sizes = {"width": 96, "feed_forward": 384, "layers": 4, "heads": 4}
    ways = {
        "full": lambda model: model,
        "lora": LoRA(r=2, target_modules=("query", "value")).attach,
        "adapter": Adapter(bottleneck=8).attach,
        "lst": LST(reduction=8).attach,
    }
    ids = torch.arange(3, 67).expand(4, -1).contiguous()
    kept = {}
    for name, way in ways.items():
        model = way(tiny_model("bert", **sizes, max_position_embeddings=64)).train()
        with watch_saved(model) as saved:
            model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        kept[name] = saved.peak_bytes / 1e6
    assert kept["lst"] < 0.45 * kept["lora"] < 0.45 * kept["full"]
    assert kept["lst"] < 0.45 * kept["adapter"]


def test_with_the_model_under_no_grad_loss_and_gradients_are_the_same_bits():
    batch, found = batch_of("llama"), []
    for without in (False, True):
        model = moved(LST(reduction=R).attach(tiny_model("llama")))
        for block in blocks(model)[1] if without else ():
            block.forward = torch.no_grad()(block.forward)
        loss = loss_of(model, batch)
        found.append((loss.detach(), gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0])
    assert differences(found[0][1], found[1][1]) == []


def test_what_is_attached_to_the_blocks_learns_nothing_through_it():
    model = moved(LoRA(r=2, target_modules=("q_proj",)).attach(tiny_model("llama"), name="inside"))
    LST(reduction=R).attach(model, name="beside")
    found = gradients(model, loss_of(model, batch_of("llama")))
    assert {name.rpartition("@")[2] for name in found} == {"beside"}


# ---- the start, the gates and the counts


def test_it_starts_from_every_rth_feature():
    base = tiny_model("llama")
    model = LST(reduction=R, layers=(1,)).attach(tiny_model("llama"))
    block, own = model.model.layers[1], base.model.layers[1]
    assert torch.equal(block.lst_self_attn_q_proj_weight, own.self_attn.q_proj.weight[::R, ::R])
    assert torch.equal(block.lst_mlp_down_proj_weight, own.mlp.down_proj.weight[::R, : 13 * R : R])
    assert torch.equal(block.lst_mlp_up_proj_weight, own.mlp.up_proj.weight[: 13 * R : R, ::R])
    assert torch.equal(model.model.lst_norm_weight, base.model.norm.weight[::R])
    h = torch.randn(2, D)
    for place, key in ((model.model, "first"), (block, "read")):
        s = F.linear(h, place.get_parameter(f"lst_{key}_weight"), place.get_parameter(f"lst_{key}_bias"))
        assert torch.equal(s, h[:, ::R])
    back = F.linear(s, model.model.lst_up_weight, model.model.lst_up_bias)
    assert torch.equal(back[:, ::R], h[:, ::R])
    assert torch.count_nonzero(back) == s.numel()
    assert block.lst_gate.item() == 0
    assert not hasattr(model.model.layers[0], "lst_gate")


def test_a_random_start_is_fixed_by_its_seed_and_draws_from_nobody_else():
    torch.manual_seed(3)
    before, found = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        model = LST(reduction=R, start="random", init_seed=seed).attach(tiny_model("bert"))
        found.append(attached(model)["default"].tensors(model))
    assert torch.equal(before, torch.get_rng_state())
    assert differences(found[0], found[1]) == []
    assert len(differences(found[0], found[2])) > 20
    up = found[0]["bert.encoder.lst_up_weight"]
    assert up.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(("alpha", "read"), [(20.0, False), (-20.0, True)])
def test_a_gate_chooses_between_what_it_has_and_what_it_reads(alpha, read):
    model = moved(LST(reduction=R).attach(tiny_model("llama")))
    for block in model.model.layers:
        block.lst_gate.data.fill_(alpha)
    found = gradients(model, loss_of(model, batch_of("llama")))
    assert bool(found["model.layers.1.lst_read_weight"].any()) is read
    assert bool(found["model.lst_first_weight"].any()) is (not read)
    assert bool(found["model.layers.0.lst_mlp_up_proj_weight"].any()) is (not read)


def test_the_published_count_of_t5_base():
    """3,878,712 (1.740 %), of which six are gates of blocks that were left out. T5-base itself is refused."""
    d, ff, r, kept = 768, 3072, 8, 9
    a, f = d // r, ff // r
    encoder = kept * (4 * a * a + 2 * a * f + 2 * a) + a + 32 * 12
    decoder = kept * (8 * a * a + 2 * a * f + 3 * a) + a + 32 * 12
    no_second_up = (a + 1) * d
    assert encoder + decoder + 2 * ladder_values(d, r, kept) - no_second_up + 6 == 3_878_712


def test_the_count_of_bert_base_is_that_of_a_bert_of_an_eighth_of_its_width():
    with torch.device("meta"):
        base = hf.BertForSequenceClassification(hf.BertConfig())
        narrow = hf.BertModel(hf.BertConfig(hidden_size=96, intermediate_size=384))
    own = sum(p.numel() for p in narrow.encoder.parameters())
    assert LST(reduction=8).count(base) == own + ladder_values(768, 8, 12)
    assert LST(reduction=8, layers=range(3)).count(base) == own // 4 + ladder_values(768, 8, 3)


# ---- beside others, and caches


def test_virtual_tokens_are_read_like_any_others():
    model = moved(PromptTuning(num_virtual_tokens=2).attach(tiny_model("llama"), name="prompt"))
    LST(reduction=R).attach(model, name="beside")
    inputs = batch_of("llama", "left")
    del inputs["labels"]
    texts = [
        model.generate(**inputs, use_cache=use, do_sample=False, max_new_tokens=3) for use in (True, False)
    ]
    assert torch.equal(*texts)
    before = model(**inputs).logits
    model.model.get_parameter("prompt@prompt").data.add_(1.0)
    assert not torch.equal(model(**inputs).logits, before)


def test_beams_reorder_both_caches():
    model, inputs = moved(LST(reduction=R).attach(tiny_model("llama"))), batch_of("llama", "left")
    del inputs["labels"]
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    with_cache, without = (model.generate(**inputs, **how, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_a_cache_that_was_filled_without_it_is_refused():
    model, ids = LST(reduction=R).attach(tiny_model("llama")), torch.tensor([[5, 6, 7]])
    switch(model)
    cache = cache_made(model(ids, use_cache=True))
    switch(model, "default")
    with pytest.raises(ValueError, match="this cache was filled without it: compute the text's beginning"):
        model(ids[:, :1], **{cache_key(model): cache})


def test_of_two_ladders_the_earlier_one_speaks_and_each_speaks_alone():
    model, said = tiny_model("bert"), {}
    for i, name in enumerate("ab"):
        moved(LST(reduction=R).attach(model, name=name), seed=i)
    for names in ("a", "b", "ab"):
        said[names] = switch(model, *names)(**batch_of("bert")).logits
    assert not torch.equal(said["a"], said["b"])
    assert torch.equal(said["ab"], said["a"])


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_on_the_body_alone_it_says_what_the_head_of_a_whole_model_reads_also_under_autocast(kind):
    """With the same values; half precision rounds what is said by some thousandths and gives every gradient."""
    inputs = batch_of(kind)
    del inputs["labels"]
    whole, body = tiny_model(kind), tiny_model(kind).base_model
    moved(LST(reduction=R).attach(whole))
    LST(reduction=R).attach(body).load_state_dict(whole.base_model.state_dict())
    said, pooled = (*body(**inputs).values(), None)[:2]
    with_head = whole.classifier(pooled) if kind == "bert" else whole.lm_head(said)
    assert torch.equal(with_head, whole(**inputs).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = body(**inputs)[0]
    assert 0 < (half - said).norm() < 0.02 * said.norm()
    found = gradients(body, half.float().sum())
    assert found.keys() == gradients(body, said.sum()).keys()
    assert all(grad.isfinite().all() for grad in found.values())


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 1}, "reduction is 1; it must be a whole number ≥ 2"),
        ({"reduction": 2.0}, "reduction is 2.0; it must be a whole number"),
        ({"gate_temperature": 0}, "gate_temperature is 0; it must be a number > 0"),
        ({"start": "fisher"}, "start is 'fisher'; it must be one of 'pruned', 'random'"),
        ({"layers": (1, 0)}, r"layers is \(1, 0\); it must be rising whole numbers, such as \(0, 2, 4\)"),
        ({"layers": ()}, r"layers is \(\); it must be rising whole numbers"),
        ({"layers": 2.5}, "layers is 2.5; it must be rising whole numbers"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LST(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reduction": 7},
            "reduction is 7; it must divide the width of the hidden states, 24, and leave at least 2 features",
        ),
        ({"reduction": 4}, "reduction is 4; it must divide the width of a head, 6, and leave at least 2"),
        ({"reduction": 2}, r"reduction is 2; it must leave pairs of the 6 features of a head"),
        ({"reduction": R, "layers": (0, 2)}, "layers has 2, and this model has the blocks 0 to 1"),
    ],
)
def test_what_doesnt_fit_the_model_is_refused_and_leaves_it_as_it_was(settings, message):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        LST(**settings).attach(model)
    assert differences(before, picture(model)) == []


def test_a_layer_that_holds_no_values_of_the_base_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(D, D))
    with pytest.raises(ValueError, match=r"no parameter 'self_attn.q_proj.weight' any more.*isn't quantised"):
        LST(reduction=R).attach(model)


def test_nothing_of_it_is_left_in_a_model_that_was_interrupted():
    model = LST(reduction=R).attach(tiny_model("llama"))
    ladder = next(part for part in attached(model)["default"].parts if hasattr(part, "ladder")).ladder
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor([[5, 6]]))
    handle.remove()
    model(torch.tensor([[5, 6]]))
    assert (ladder.entered, ladder.calls, ladder.said) == (None, {}, {})
    assert len(trainable(model)) > 30
