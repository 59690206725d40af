"""Files of HF PEFT's, both ways: what was trained here computes the same there, and the other way round."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pefttutor as pt
from pefttutor.parts.part import of_kind
from pefttutor.parts.triplets import Triplets
from pefttutor.saving.peft_files import CONFIG, TENSORS
from tests.cases import moved
from tests.pictures import differences, picture
from tests.tiny import made, tiny_batch, tiny_config, tiny_model

# What HF PEFT warns of, and what is meant: a tied head that is saved twice, the cache's name of before, no name of a
# base (0.20), an embedding's own weight, its own names for the triplets of a layer, a layer that has none left, and
# VeRA's A and B that no file holds.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Model has `tie_word_embeddings=True`",
        "`past_key_values` is deprecated",
        "Could not find a config file in  -",
        "Setting `save_embedding_layers` to `True` as embedding",
        "The following rank_pattern keys",
        ".*LoRA tensor.s. have invalid shape",
        "Specified to not (save|load) vera_A and vera_B",
    )
]
BF16 = torch.bfloat16
FED = {"feedforward_modules": ("wo",)}
BERT = {"target_modules": ("query", "attention.output.dense"), "modules_to_save": ("classifier",)}
TOKENS = {"num_virtual_tokens": 3}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


def base(kind: str, dtype: torch.dtype = torch.float32, **own: Any) -> Any:
    if kind == "llama classifier":
        return made(hf.LlamaForSequenceClassification, tiny_config("llama", num_labels=3), spread=True).to(
            dtype
        )
    if kind == "mistral":  # without biases, one of which HF PEFT adds twice with its adaption prompts
        sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
        config = hf.MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        return made(hf.MistralForCausalLM, config, spread=True).to(dtype)
    return tiny_model(kind, dtype=dtype, **own)


def batch_of(kind: str) -> dict[str, Tensor]:
    """Two texts without padding before them, which HF PEFT's virtual tokens don't know of; for a classifier none."""
    batch = tiny_batch("bert" if "classifier" in kind else "llama" if kind == "mistral" else kind)
    batch = {key: value[:1] if "classifier" in kind else value[:2] for key, value in batch.items()}
    return batch | ({"decoder_input_ids": batch["input_ids"]} if kind == "t5" else {})


def logits(model: nn.Module, kind: str) -> Tensor:
    """What is said of the text's own tokens."""
    batch = batch_of(kind)
    labels = batch.pop("labels")
    said = model.eval()(**batch).logits
    return said[:, -labels.shape[1] :] if said.dim() == 3 else said


def trained(model: Any, kind: str, steps: int = 3, lr: float = 0.05) -> Any:
    """The model after real steps."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, method = (
        torch.optim.AdamW(own, lr=lr),
        None if isinstance(model, peft.PeftModel) else pt.adapted(model),
    )
    for step in range(steps):
        torch.manual_seed(step)
        model.train()(**batch_of(kind)).loss.backward()
        optimizer.step()
        if hasattr(method, "after_step"):
            method.after_step(model, step)
        elif isinstance(model, peft.PeftModel) and hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def written(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **options: Any) -> None:
    """Change a file as another program would."""
    config, before = written(folder)
    (folder / CONFIG).write_text(json.dumps(config | options))
    save_file(before if tensors is None else tensors, folder / TENSORS, metadata={"format": "pt"})


def greedy(model: nn.Module, ids: Tensor, steps: int = 4) -> Tensor:
    """By whole passes, without a cache."""
    for _ in range(steps):
        said = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, said[:, -1:].argmax(-1)], 1)
    return ids


# ---- ours, read there

OURS = {
    "LoRA": ("llama", pt.LoRA(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1)),
    "LoRA of an embedding": ("gpt2", pt.LoRA(r=3, target_modules=("attn.c_proj", "wte"), modules_to_save=("ln_f",))),
    "LoRA and a head": ("bert", pt.LoRA(r=3, **BERT)),
    "LoRA and a tied head": ("t5", pt.LoRA(r=3, target_modules=("q", "wo"), modules_to_save=("lm_head",))),
    "LoRA beside a frozen head": ("bert", pt.LoRA(r=3, target_modules=("query",))),
    "LoRAFA": ("llama", pt.LoRAFA(r=3)),
    "LoRAPlus": ("gpt2", pt.LoRAPlus(r=3, target_modules=("c_attn",))),
    "PiSSA": ("gpt2", pt.PiSSA(r=3, lora_alpha=5, target_modules=("c_attn", "wte"))),
    "MiLoRA": ("llama", pt.MiLoRA(r=3, lora_alpha=5)),
    "DoRA": ("gpt2", pt.DoRA(r=3, target_modules=("c_attn", "wte"))),
    "DoRA and a head": ("bert", pt.DoRA(r=3, **BERT)),
    "AdaLoRA": ("llama", pt.AdaLoRA(init_r=4, target_r=1, total_step=3)),
    "AdaLoRA by its rank": ("bert", pt.AdaLoRA(init_r=4, target_r=2, total_step=9, scale_by_rank=True, **BERT)),
    "LoHa": ("llama", pt.LoHa(r=2, alpha=5, target_modules=("q_proj", "down_proj"))),
    "LoKr": ("bert", pt.LoKr(r=1, alpha=5, **BERT)),
    "LoKr of both": ("llama", pt.LoKr(r=2, decompose_both=True, target_modules=("v_proj", "down_proj"))),
    "LoKr by a factor": ("t5", pt.LoKr(r=9, decompose_factor=4, target_modules=("q", "wo"))),
    "VeRA": ("gpt2", pt.VeRA(r=30, target_modules=("c_attn", "mlp.c_proj"))),
    "VeRA and a head": ("bert", pt.VeRA(r=30, d_initial=0.5, projection_prng_key=3, **BERT)),
    "IA3": ("t5", pt.IA3(target_modules=("k", "v", "wo"), **FED)),
    "IA3 of a Conv1D": ("gpt2", pt.IA3(target_modules=("c_attn", "mlp.c_proj"), feedforward_modules=("mlp.c_proj",))),
    "LayerNormTuning": ("bert", pt.LayerNormTuning(modules_to_save=("classifier",))),
    "LLaMAAdapter": ("mistral", pt.LLaMAAdapter(adapter_len=4, adapter_layers=2)),
    "PromptTuning": ("t5", pt.PromptTuning(**TOKENS)),
    "PromptTuning and a head": ("llama classifier", pt.PromptTuning(**TOKENS, modules_to_save=("score",))),
    "PromptTuning before a frozen head": ("llama classifier", pt.PromptTuning(**TOKENS)),
    "PTuning": ("gpt2", pt.PTuning(**TOKENS)),
    "PrefixTuning": ("llama", pt.PrefixTuning(**TOKENS, prefix_projection=True)),
}  # fmt: skip
# HF PEFT computes these in the same order; a low-rank branch it adds after the layer, not into the layer's own product.
SAME_BITS = ("IA3", "LayerNormTuning", "PromptTuning", "PrefixTuning")


@pytest.mark.parametrize("which", OURS)
def test_what_was_trained_here_says_the_same_there(which, tmp_path):
    kind, method = OURS[which]
    model = trained(method.attach(base(kind)), kind)
    assert pt.to_peft(model, tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    mine, other = logits(model, kind), logits(theirs, kind)
    assert (mine - logits(base(kind), kind)).abs().max() > 0.1
    exact = which.startswith(SAME_BITS)
    torch.testing.assert_close(mine, other, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    again = pt.from_peft(base(kind), tmp_path)
    torch.testing.assert_close(logits(again, kind), mine, rtol=1e-5, atol=1e-5)
    if kind in ("llama", "gpt2", "t5", "mistral"):
        ids = batch_of(kind)["input_ids"][:1]
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | settings
        # HF PEFT 0.21 gives wrong positions to a text behind virtual tokens that it goes on from a cache.
        by_cache = kind == "t5" or which not in ("PTuning", "PrefixTuning")
        assert torch.equal(
            model.generate(**asked), theirs.generate(**asked) if by_cache else greedy(theirs, ids)
        )


@pytest.mark.parametrize(
    "which", ["LoRA", "LoRA and a head", "PiSSA", "DoRA", "AdaLoRA", "IA3", "PromptTuning"]
)
def test_in_half_precision_they_differ_by_roundings(which, tmp_path):
    """HF PEFT rounds a float32 branch once, here its factors are rounded first; virtual tokens are the same bits."""
    kind, method = OURS[which]
    model = trained(method.attach(base(kind, BF16)), kind)
    pt.to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind, BF16), tmp_path).eval()
    mine, other, wide = (logits(m, kind).float() for m in (model, theirs, copy.deepcopy(model).float()))
    assert (mine - other).abs().max() <= 2 * max((mine - wide).abs().max(), (other - wide).abs().max()) < 0.3
    if which == "PromptTuning":
        assert torch.equal(mine, other)
    again = pt.from_peft(base(kind, BF16), tmp_path)
    torch.testing.assert_close(logits(again, kind).float(), mine, rtol=0.02, atol=0.1)


class Twice(nn.Module):
    """One module at two places, of which HF PEFT would replace one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.body(x)))


def test_a_module_that_stands_at_two_places_is_written_for_both(tmp_path):
    method, x = pt.LoRA(r=2, target_modules=("body",), modules_to_save=("a",)), torch.randn(3, 4)
    model = moved(method.attach(made(Twice)))
    pt.to_peft(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(made(Twice), tmp_path)(x), model(x))
    assert torch.equal(pt.from_peft(made(Twice), tmp_path)(x), model(x))


def test_adalora_is_divided_by_another_number_there(tmp_path):
    """By init_r + 0.00001, so the file has a larger lora_alpha; what was cut isn't in it, and the count is found."""
    model = trained(OURS["AdaLoRA"][1].attach(base("llama")), "llama")
    pt.to_peft(model, tmp_path)
    config, tensors = written(tmp_path)
    assert config["lora_alpha"] / (torch.tensor(4.0) + 1e-5).item() == pytest.approx(8 / 4, rel=1e-12)
    ranks = {path: sum(kept) for path, kept in config["rank_pattern"].items()}
    assert ranks == {f"{path}.lora_E": rank for path, rank in pt.adapted(model).ranks(model).items()}
    assert {k: len(tensors[f"base_model.model.{k}"]) for k in ranks} == ranks
    again = pt.from_peft(base("llama"), tmp_path)
    assert pt.adapted(again).lora_alpha == pytest.approx(8, rel=1e-12)
    assert int(again.adalora_step) == 4  # all ranks are given out
    assert pt.adapted(trained(again, "llama", steps=1)).ranks(again) == pt.adapted(model).ranks(model)
    for part in of_kind(pt.attached(again)["default"].parts, Triplets):
        assert not part.held("lora_E")[~part.held("lora_kept")].any()
        assert part.held("lora_A").any(1).all()  # drawn anew, so that it may come back


def test_triplets_that_grow_again_between_two_rounds_are_written_too(tmp_path):
    model = trained(OURS["AdaLoRA"][1].attach(base("llama")), "llama")
    part = pt.attached(model)["default"].parts[0]
    assert not part.held("lora_kept").all()
    part.held("lora_E").data.add_(0.3)
    pt.to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path)
    torch.testing.assert_close(logits(theirs, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


def test_names_are_short_where_they_mean_the_same(tmp_path):
    names = []
    for method in (pt.LoRA(r=2), pt.LoRA(r=2, target_modules=("layers.0.self_attn.q_proj",))):
        pt.to_peft(method.attach(base("llama")), tmp_path)
        names.append(written(tmp_path)[0]["target_modules"])
    assert names == [["q_proj", "v_proj"], ["model.layers.0.self_attn.q_proj"]]
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(3, 3)}), "up": nn.Linear(3, 3)})
    pt.to_peft(pt.LoRA(r=2, target_modules="up").attach(copy.deepcopy(model)), tmp_path)
    assert written(tmp_path)[0]["target_modules"] == "up"  # the pattern, which the name in a list wouldn't be
    assert list(peft.PeftModel.from_pretrained(model, tmp_path).targeted_module_names) == ["up"]


# ---- theirs, read here

LORA = {"r": 3, "lora_alpha": 5}
FFN = "mlp.c_proj"
ALL_NORMS = ["ln_1", "ln_2", "ln_f"]
ADALORA = {"init_r": 4, "target_r": 1, "total_step": 3, "target_modules": ["query", "attention.output.dense"]}
THEIRS = {
    "LoRA": ("llama", peft.LoraConfig(**LORA, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj", "up_proj"])),
    "LoRA of one layer": ("gpt2", peft.LoraConfig(**LORA, target_modules=["c_attn"], layers_to_transform=[1])),
    "LoRA but for one": ("gpt2", peft.LoraConfig(**LORA, target_modules=["c_proj"], exclude_modules=["0.mlp.c_proj"])),
    "LoRA by a pattern": ("gpt2", peft.LoraConfig(**LORA, target_modules=r".*\.1\..*c_(proj|fc)")),
    "LoRA everywhere": ("bert", peft.LoraConfig(**LORA, target_modules="all-linear", task_type="SEQ_CLS")),
    "LoRA of words": ("llama", peft.LoraConfig(**LORA, target_modules=["embed_tokens", "v_proj"])),
    "LoRA and a norm": ("gpt2", peft.LoraConfig(**LORA, target_modules=["wte", "c_attn"], modules_to_save=["ln_f"])),
    "DoRA": ("gpt2", peft.LoraConfig(**LORA, target_modules=["c_attn", "wte"], use_dora=True)),
    "PiSSA": ("llama", peft.LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights="pissa", use_rslora=True)),
    "AdaLoRA": ("bert", peft.AdaLoraConfig(**ADALORA, task_type="SEQ_CLS")),
    "LoHa": ("llama", peft.LoHaConfig(r=2, alpha=5, target_modules=["q_proj", "down_proj"])),
    "LoKr": ("bert", peft.LoKrConfig(r=1, alpha=5, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "LoKr of both": ("llama", peft.LoKrConfig(r=2, decompose_both=True, target_modules=["v_proj", "down_proj"])),
    "LoKr by a factor": ("t5", peft.LoKrConfig(r=9, decompose_factor=4, target_modules=["q", "wo"])),
    "VeRA": ("gpt2", peft.VeraConfig(r=30, target_modules=["c_attn", "mlp.c_proj"], vera_dropout=0.1)),
    "IA3": ("t5", peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "IA3 of a Conv1D": ("gpt2", peft.IA3Config(target_modules=["c_attn", FFN], feedforward_modules=[FFN])),
    "norms": ("gpt2", peft.LNTuningConfig(target_modules=ALL_NORMS)),
    "adaption prompts": ("mistral", peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")),
    "prompt": ("t5", peft.PromptTuningConfig(**TOKENS, task_type="SEQ_2_SEQ_LM")),
    "prompt and a head": ("llama classifier", peft.PromptTuningConfig(**TOKENS, task_type="SEQ_CLS")),
    "prefix": ("gpt2", peft.PrefixTuningConfig(**TOKENS, task_type="CAUSAL_LM")),
    "p-tuning": ("llama", peft.PromptEncoderConfig(**TOKENS, task_type="CAUSAL_LM", encoder_hidden_size=5)),
}  # fmt: skip
WITHOUT_THEIR_ENCODER = ("p-tuning",)


def wrapped(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(base(kind), copy.deepcopy(config))


def gradients(model: Any, kind: str) -> dict[str, Tensor]:
    """Of a weighted sum of the logits, by our names and as one row each."""
    said = logits(model, kind)
    model.zero_grad()
    (said * torch.linspace(-1, 1, said.numel()).view_as(said)).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name and "original_module" not in name:
            name = name.removeprefix("base_model.").removeprefix(
                "model." if "base_model.model." in name else ""
            )
            name = name.replace("self_attn.adaption_", "self_attn.o_proj.adaption_")
            name = re.sub(r"\.modules_to_save\.default|\.ln_tuning_layers\.default", "", name)
            name = (
                name.replace("lora_embedding_", "lora_").removesuffix(".weight") if "lora_" in name else name
            )
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name.removesuffix(".default")] = grad
    return found


def same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    prompts = [name for name in theirs if name.startswith("prompt_encoder")]
    for name in prompts:  # an encoder-decoder's second half is never read
        (own,) = [key for key in mine if key.endswith((".prompt", ".prefix"))]
        theirs[own] = theirs.pop(name)[:3]
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        rows = kept.get(name.rpartition(".")[0], slice(None)) if "lora" in name else slice(None)
        one, other = (g.t() if name.endswith("lora_B") else g for g in (grad, theirs[name]))
        torch.testing.assert_close(one[rows].flatten(), other[rows].flatten(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", THEIRS)
def test_what_was_trained_there_says_the_same_here_and_trains_on(which, tmp_path):
    kind, config = THEIRS[which]
    theirs = trained(wrapped(kind, config), kind)
    theirs.save_pretrained(tmp_path)
    model, plain = base(kind), base(kind)
    assert pt.from_peft(model, tmp_path, name="theirs") is model
    other = logits(theirs, kind)
    torch.testing.assert_close(logits(model, kind), other, rtol=2e-5, atol=2e-5)
    assert (other - logits(plain, kind)).abs().max() > 0.05
    if which not in WITHOUT_THEIR_ENCODER:
        mine = {name.replace("@theirs", ""): grad for name, grad in gradients(model, kind).items()}
        kept = {n.removesuffix(".lora_kept@theirs"): b for n, b in model.named_buffers() if "lora_kept" in n}
        same_gradients(mine, gradients(theirs, kind), kept)
    model.zero_grad()
    loss = model(**batch_of(kind)).loss.item()
    assert trained(model, kind, steps=1, lr=1e-4)(**batch_of(kind)).loss < loss
    pt.detach(model)
    assert differences({n: t for n, t in plain.state_dict().items()}, dict(model.state_dict())) == []


def test_projections_that_no_file_holds_are_drawn_as_there(tmp_path):
    """Of layers of two sizes; once they are here, our files hold them."""
    names = ["q_proj", "down_proj"]
    config = peft.VeraConfig(r=30, projection_prng_key=7, save_projection=False, target_modules=names)
    theirs = trained(wrapped("llama", config), "llama")
    theirs.save_pretrained(tmp_path)
    assert not [key for key in written(tmp_path)[1] if "vera_A" in key]
    model = pt.from_peft(base("llama"), tmp_path)
    for key in ("vera_A", "vera_B"):
        assert torch.equal(getattr(model, key), getattr(theirs.base_model, key)["default"])
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), rtol=2e-5, atol=2e-5)
    pt.save(model, tmp_path / "ours")
    assert torch.equal(logits(pt.load(base("llama"), tmp_path / "ours"), "llama"), logits(model, "llama"))


def test_options_of_products_that_mean_something_else_are_refused(tmp_path):
    wrapped("llama", peft.LoKrConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    before, options = written(tmp_path)[1], written(tmp_path)[0]
    first = next(iter(before))
    for changed_file, changed_options, message in (
        (before, {"module_dropout": 0.1}, "module_dropout = 0.1, which can't be said here"),
        (before, {"rank_pattern": {"q_proj": 3}}, "rank_pattern = .*all layers have one rank"),
        (before, {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern = .*all layers have one alpha"),
        (before, {"decompose_factor": 5}, "decompose_factor is 5, which doesn't divide both sizes"),
        (before, {"r": 12}, "lokr_w2 is missing"),
        (
            {k: t for k, t in before.items() if k != first},
            {},
            f"{first.removeprefix('base_model.model.')} is missing",
        ),
    ):
        rewrite(tmp_path, changed_file, **options | changed_options)
        model = base("llama")
        unchanged = picture(model)
        with pytest.raises(ValueError, match=message):
            pt.from_peft(model, tmp_path)
        assert differences(unchanged, picture(model)) == []


# ---- what can't be said

OWN_WEIGHTS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}


@pytest.fixture
def folder(tmp_path):
    """A LoRA of a tiny Llama, as HF PEFT writes it."""
    wrapped("llama", peft.LoraConfig(**OWN_WEIGHTS, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, "bias = 'lora_only', which can't be said here.*BitFit"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern = .*all layers have one rank"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern = .*one alpha"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = "),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = .3.*merge it into the weights there"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"total_step": 3}, "total_step = 3"),
        ({"of_next_year": 0.5}, "of_next_year = 0.5, which can't be said here"),
        ({"of_next_year": 0}, "of_next_year = 0, which"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora', which has changed the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "BOFT"}, "peft_type 'BOFT'; what can be read is LORA, ADALORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"lora_alpha": "much"}, "settings that don't fit: lora_alpha is 'much'"),
        ({"peft_type": ["LORA"]}, "peft_type .'LORA'.; what can be read"),
        ({"use_rslora": "false"}, "settings that don't fit: use_rslora is 'false'"),
        ({"lora_alpha": 10**400}, "settings that don't fit: "),
        ({"r": 3}, r"lora_A has the shape \(2, 24\), not \(3, 24\)"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks tensors for model.layers.0.self_attn.k_proj"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
        ({"modules_to_save": ["head"]}, "lm_head.weight is missing"),
        ({"modules_to_save": ["tail"]}, "modules_to_save 'tail', and this model has none such"),
    ],
)
def test_an_option_that_means_something_else_is_refused_by_its_name(folder, options, message):
    rewrite(folder, **options)
    model = base("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        pt.from_peft(model, folder)
    assert differences(before, picture(model)) == []


def test_an_option_at_its_default_or_without_effect_is_let_through(folder):
    rewrite(
        folder, of_next_year=None, rank_pattern={"q_proj": 2}, megatron_core="another", inference_mode=False,
        modules_to_save=["classifier", "score"], init_lora_weights="eva", eva_config={"rho": 2.0},
    )  # fmt: skip
    assert pt.adapted(pt.from_peft(base("llama"), folder)).target_modules == ("q_proj", "v_proj")


def changed(tensors: dict[str, Tensor], do: str) -> dict[str, Tensor]:
    first = next(iter(tensors))
    return {
        "missing": {k: t for k, t in tensors.items() if k != first},
        "foreign": tensors | {"lora_unet.weight": torch.ones(2)},
        "unknown": tensors | {"base_model.model.model.norm.lora_X": torch.ones(2)},
        "elsewhere": tensors | {first.replace("layers.0", "layers.7"): tensors[first].clone()},
        "nan": tensors | {first: tensors[first] * float("nan")},
        "too large": tensors | {first: tensors[first].double() * 1e300},
        "twice": tensors | {first.removesuffix(".weight"): tensors[first].clone()},
        "other base": tensors | {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(97, 24)},
        "resized": tensors | {"base_model.model.model.embed_tokens.weight": torch.ones(99, 24)},
        "none": {},
    }[do]


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("missing", "lora_A is missing"),
        ("foreign", r"aren't HF PEFT's, whose names begin with 'base_model.model.': lora_unet.weight"),
        ("unknown", "a tensor 'model.norm.lora_X' that nothing is known of"),
        ("elsewhere", r"this model has no 'model.layers.7.self_attn.q_proj': it was trained on another base"),
        ("nan", "holds NaN or infinity"),
        ("too large", "holds NaN or infinity, or what is as good as that in torch.float32"),
        ("twice", "has '.*lora_A.weight' and the same once more"),
        ("other base", "brings its own 'model.embed_tokens.weight'"),
        ("resized", r"\(99, 24\), and this model has another one, \(97, 24\): was the vocabulary resized"),
        ("none", "target_modules .*lacks tensors for|no tensors of its method"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_the_model_untouched(folder, do, message):
    rewrite(folder, tensors=changed(written(folder)[1], do))
    model = base("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        pt.from_peft(model, folder)
    assert differences(before, picture(model)) == []


def test_files_that_are_missing_pickled_or_broken(folder, tmp_path):
    model = base("llama")
    with pytest.raises(FileNotFoundError, match="the folder doesn't exist"):
        pt.from_peft(model, tmp_path / "nowhere")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which can run any program"):
        pt.from_peft(model, folder)
    (folder / TENSORS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        pt.from_peft(model, folder)
    (folder / CONFIG).write_text("[")
    with pytest.raises(ValueError, match="it isn't JSON"):
        pt.from_peft(model, folder)
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="it isn't JSON"):
        pt.from_peft(model, folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="isn't an object with options"):
        pt.from_peft(model, folder)


def test_a_file_of_ours_knows_its_base(tmp_path):
    pt.to_peft(pt.LoRA(r=2, modules_to_save=("lm_head",)).attach(base("llama")), tmp_path)
    other = base("llama")
    other.lm_head.weight.data.mul_(2)  # that one comes with the file
    pt.from_peft(other, tmp_path)
    other = base("llama", seed=1)
    with pytest.raises(ValueError, match=r"another base model.*embed_tokens.weight has other values"):
        pt.from_peft(other, tmp_path)


def test_a_head_that_was_untied_there_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    wrapped("gpt2", config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' is tied to .*Untie them first"):
        pt.from_peft(base("gpt2"), tmp_path)
    model = base("gpt2", tie_word_embeddings=False)
    model.transformer.wte.weight.data.copy_(base("gpt2").transformer.wte.weight)
    assert pt.adapted(pt.from_peft(model, tmp_path)).modules_to_save == ("lm_head",)


def test_weights_that_stay_tied_there_are_read(tmp_path):
    """The file has them twice, and the same."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    theirs = peft.get_peft_model(base("llama", tie_word_embeddings=True), config)
    trained(theirs, "llama").save_pretrained(tmp_path)
    model = pt.from_peft(base("llama", tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_embedding_that_was_not_started_as_pissa_is_refused(tmp_path):
    """HF PEFT starts the embedding as a LoRA, and the others as PiSSA."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], init_lora_weights="pissa")
    wrapped("gpt2", config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"starts no embedding as PiSSA does, and 'transformer.wte'"):
        pt.from_peft(base("gpt2"), tmp_path)


@pytest.mark.parametrize(("kind", "task", "rows"), [("llama", "CAUSAL_LM", 3), ("t5", "SEQ_2_SEQ_LM", 6)])
def test_fewer_virtual_tokens_than_the_file_has_are_refused(kind, task, rows, tmp_path):
    wrapped(kind, peft.PromptTuningConfig(**TOKENS, task_type=task)).save_pretrained(tmp_path)
    rewrite(tmp_path, num_virtual_tokens=2)
    with pytest.raises(
        ValueError, match=f"num_virtual_tokens = 2, and 'prompt_embeddings' .* has {rows} rows"
    ):
        pt.from_peft(base(kind), tmp_path)


def test_a_layer_that_stands_at_two_places_is_refused_both_ways(tmp_path):
    """HF PEFT changes it at the first only."""
    method = pt.LoRA(r=2, target_modules=("a",))
    with pytest.raises(ValueError, match=r"'b' and 'a' are one layer, and HF PEFT changes .* at one of"):
        pt.to_peft(method.attach(made(Twice)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    peft.get_peft_model(made(Twice), peft.LoraConfig(r=2, target_modules=["a"])).save_pretrained(tmp_path)
    model = made(Twice)
    before = picture(model)
    with pytest.raises(ValueError, match="'b' and 'a' are one layer"):
        pt.from_peft(model, tmp_path)
    assert differences(before, picture(model)) == []


def whisper() -> tuple[Any, dict[str, Tensor]]:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    places = {"max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8}
    config = hf.WhisperConfig(vocab_size=97, d_model=24, **sizes, **tokens, **places)
    sound = torch.linspace(-1, 1, 160).view(1, 8, 20)
    model = made(hf.WhisperForConditionalGeneration, config, spread=True)
    return model, {"input_features": sound, "decoder_input_ids": torch.tensor([[5, 6, 7]])}


def mamba() -> tuple[Any, dict[str, Tensor]]:
    config = hf.MambaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, state_size=4)
    return made(hf.MambaForCausalLM, config, spread=True), {"input_ids": torch.tensor([[5, 6, 7]])}


@pytest.mark.parametrize(
    ("make", "method"),
    [(whisper, pt.LoRA(r=2)), (mamba, pt.PromptTuning(num_virtual_tokens=3))],
)
def test_a_model_that_hears_and_one_without_heads(make, method, tmp_path):
    """HF PEFT's class for sequences wants ids, and its virtual tokens a number of heads."""
    model, inputs = make()
    moved(method.attach(model))
    pt.to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make()[0], tmp_path).eval()
    mine, other = (m(**inputs).logits[:, -3:] for m in (model.eval(), theirs))
    assert (mine - make()[0](**inputs).logits).abs().max() > 0.1
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_factors_that_two_tied_layers_share_there_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(base("llama", tie_word_embeddings=True), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ensure_weight_tying = True, which can't be said here"):
        pt.from_peft(base("llama", tie_word_embeddings=True), tmp_path)


def test_norms_of_which_only_some_train_are_refused(tmp_path):
    wrapped("gpt2", peft.LNTuningConfig(target_modules=["ln_1"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LayerNormTuning trains every norm"):
        pt.from_peft(base("gpt2"), tmp_path)


WITHOUT = {
    "BitFit": ("gpt2", pt.BitFit(), r"no BitFit is written for HF PEFT; there are LoRA, .*pefttutor.as_lora"),
    "AdaLoRA": ("gpt2", pt.AdaLoRA(init_r=2, target_r=2, total_step=2, target_modules=("wte",)), "takes no embeddings"),
    "LoHa": ("gpt2", pt.LoHa(r=2, target_modules=("c_attn",)), "LoHa takes no Conv1D, and '.*h.0.attn.c_attn'"),
    "LoKr": ("gpt2", pt.LoKr(r=2, target_modules=("c_attn",)), "LoKr takes no Conv1D"),
    "IA3": ("gpt2", pt.IA3(target_modules=("wte",), feedforward_modules=()), "takes no embeddings"),
    "a gate a head": ("mistral", pt.LLaMAAdapter(gate="head"), "gate is 'head', and HF PEFT has one number for all"),
    "a head beside prompts": ("mistral", pt.LLaMAAdapter(modules_to_save=("lm_head",)), "HF PEFT trains nothing else"),
    "a bias added twice": ("llama", pt.LLaMAAdapter(), "self_attn.o_proj has a bias, which HF PEFT adds a second"),
    "another type": ("qwen3", pt.LLaMAAdapter(), "those of llama and mistral, and this model is of the type 'qwen3'"),
    "places": ("gpt2", pt.PTuning(**TOKENS, placeholder_token_id=9), "HF PEFT knows them only before it"),
    "pooled": ("bert", pt.PromptTuning(**TOKENS), "classifies by a text's first token"),
    "T5": ("t5", pt.PrefixTuning(**TOKENS), "HF PEFT's prefixes are those of causal language models"),
    "BERT": ("bert", pt.PrefixTuning(**TOKENS), "HF PEFT's prefixes are those of causal language models"),
}  # fmt: skip


@pytest.mark.parametrize("which", WITHOUT)
def test_what_hf_peft_does_not_have_is_refused_with_what_to_do(which, tmp_path):
    kind, method, message = WITHOUT[which]
    with pytest.raises(ValueError, match=message):
        pt.to_peft(method.attach(base(kind)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prompts_in_attentions_that_mean_something_else_are_refused(tmp_path):
    """HF PEFT's own come back bit for bit where they mean the same."""
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = trained(wrapped("mistral", config), "mistral")
    theirs.save_pretrained(tmp_path)
    before = written(tmp_path)[1]
    model = pt.from_peft(base("mistral"), tmp_path)
    pt.to_peft(model, tmp_path / "again")
    again = written(tmp_path / "again")[1]
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())
    first = next(key for key in before if key.endswith("prompt"))
    for changed_file, kind, options, message in (
        ({}, "llama", {}, "has a bias, which HF PEFT adds a second time"),
        ({}, "gpt2", {}, r"this model has no 'model.layers.1.self_attn'"),
        ({}, "mistral", {"target_modules": "mlp"}, "target_modules = 'mlp', which can't be said here"),
        ({}, "mistral", {"adapter_layers": 3}, r"model.layers.0.self_attn.o_proj.adaption_prompt is missing"),
        (
            {first: before[first][0]},
            "mistral",
            {},
            r"has the shape \(4, 24\), and prompts are \(1, adapter_len, d\)",
        ),
        (
            {first: before[first][:, :3]},
            "mistral",
            {},
            r"adaption_prompt has the shape \(3, 24\), not \(4, 24\)",
        ),
    ):
        theirs.save_pretrained(tmp_path)
        rewrite(tmp_path, before | changed_file, **options)
        other = base(kind)
        unchanged = picture(other)
        with pytest.raises(ValueError, match=message):
            pt.from_peft(other, tmp_path)
        assert differences(unchanged, picture(other)) == []


def test_several_merged_or_switched_off_attachments(tmp_path):
    model = pt.LoRA(r=2).attach(
        pt.LoRA(r=2, target_modules=("o_proj",)).attach(base("llama"), name="a"), name="b"
    )
    with pytest.raises(ValueError, match="say which one by its name"):
        pt.to_peft(model, tmp_path)
    pt.merge(model, "a")
    with pytest.raises(RuntimeError, match="is merged"):
        pt.to_peft(model, tmp_path, name="a")
    pt.switch(pt.unmerge(model), "a")
    with pytest.raises(RuntimeError, match="'b' is switched off"):
        pt.to_peft(model, tmp_path, name="b")
    pt.to_peft(model, tmp_path, name="a")
    assert set(written(tmp_path)[1]) == {
        f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"
    }
    with pytest.raises(ValueError, match="already adapted"):
        pt.from_peft(model, tmp_path, name="a")


def test_an_interrupted_write_leaves_nothing_that_could_be_read_wrongly(tmp_path, monkeypatch):
    pt.to_peft(pt.LoRA(r=2, lora_alpha=1).attach(base("llama")), tmp_path)
    real, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("pefttutor.saving.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pt.to_peft(pt.LoRA(r=2, lora_alpha=9).attach(base("llama")), tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [TENSORS]
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json doesn't exist: the folder has"):
        pt.from_peft(base("llama"), tmp_path)


def test_a_full_disk_leaves_the_file_of_before(tmp_path, monkeypatch):
    model = moved(pt.LoRA(r=2, lora_alpha=1).attach(base("llama")))
    pt.to_peft(model, tmp_path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        pt.to_peft(pt.LoRA(r=2, lora_alpha=9).attach(base("llama")), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    assert torch.equal(logits(pt.from_peft(base("llama"), tmp_path), "llama"), logits(model, "llama"))


def test_writing_needs_no_peft(tmp_path):
    """In a fresh process, so that the tests' own import doesn't count."""
    code = (
        "import sys, torch, pefttutor as pt; from torch import nn; sys.modules['peft'] = None\n"
        "model = pt.LoRA(r=2, target_modules=('0',)).attach(nn.Sequential(nn.Linear(6, 4)))\n"
        "folder = pt.to_peft(model, sys.argv[1])\n"
        "pt.from_peft(pt.detach(model), folder)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
