"""Adapters saved and loaded; every file that isn't one, and every base that isn't the one, is refused whole."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from torch import nn

import pefttutor
from pefttutor import LoRA, adapted, load, save, trainable
from pefttutor.saving import adapters as storage

FILE = "adapter.safetensors"


def picture(model: nn.Module) -> tuple:
    """Everything an error must not change."""
    return (
        {
            name: (id(module), module.training, len(module._forward_hooks))
            for name, module in model.named_modules()
        },
        {name: (id(p), p._version, p.requires_grad, id(p.grad)) for name, p in model.named_parameters()},
        {name: tensor.clone() for name, tensor in model.state_dict().items()}.keys(),
        adapted(model),
    )


@pytest.fixture
def saved(tiny, batch, redraw, tmp_path):
    """A folder with an adapter of a tiny Llama, and the logits that it gives."""
    model = redraw(LoRA(r=3, lora_alpha=5).attach(tiny("llama")))
    assert save(model, tmp_path / "adapter") == tmp_path / "adapter"
    return tmp_path / "adapter", model(**batch("llama")).logits


def header(path) -> dict:
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    return json.loads(path.read_bytes()[8 : 8 + size])


def rewrite(path, **changes) -> None:
    """Change entries of the description, inside the file and in its readable copy."""
    from safetensors.torch import load_file, save_file

    description = json.loads(header(path)["__metadata__"]["pefttutor"]) | changes
    save_file(load_file(path), path, metadata={"pefttutor": json.dumps(description)})
    path.with_name("adapter.json").write_text(json.dumps(description))


# ---- saving and loading ----


def test_a_loaded_adapter_computes_the_same_bits(tiny, batch, redraw, kind, targets, tmp_path):
    method = LoRA(r=2, lora_alpha=5, target_modules=targets, lora_dropout=0.1, use_rslora=True, init_seed=4)
    model, inputs = redraw(method.attach(tiny(kind))), batch(kind)
    folder = save(model, str(tmp_path / "a"))
    base = tiny(kind)
    assert load(base, str(folder)) is base
    assert adapted(base) == method
    assert torch.equal(base(**inputs).logits, model(**inputs).logits)
    assert trainable(base) == trainable(model)


def test_only_what_was_learned_is_in_the_folder(saved):
    folder, _ = saved
    assert sorted(entry.name for entry in folder.iterdir()) == ["adapter.json", FILE]
    names = header(folder / FILE).keys() - {"__metadata__"}
    assert names == {
        f"model.layers.{layer}.self_attn.{name}_proj.lora_{x}"
        for layer in (0, 1)
        for name in "qv"
        for x in "AB"
    }
    description = json.loads((folder / "adapter.json").read_text())
    assert description == json.loads(header(folder / FILE)["__metadata__"]["pefttutor"])
    assert description["method"] == "LoRA"
    assert description["fields"]["r"] == 3


def test_heads_that_train_fully_are_saved_with_their_buffers(tmp_path, redraw):
    def base() -> nn.Module:
        torch.manual_seed(0)
        layers = {"body": nn.Linear(4, 4), "head": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))}
        return nn.Sequential(*nn.ModuleDict(layers).values())

    model = redraw(LoRA(r=2, target_modules="0", modules_to_save=("1",)).attach(base())).train()
    model(torch.randn(8, 4) + 3)
    save(model, tmp_path)
    other = base()
    nn.init.normal_(other[1][1].weight)  # a new head starts at random: it is no part of the base
    x = torch.randn(5, 4)
    assert torch.equal(load(other, tmp_path).eval()(x), model.eval()(x))


def test_a_tied_weight_that_trains_is_saved_once_and_stays_tied(tiny, batch, redraw, tmp_path):
    model = redraw(LoRA(modules_to_save=("lm_head",)).attach(tiny("llama", tie_word_embeddings=True)))
    save(model, tmp_path)
    other = load(tiny("llama", tie_word_embeddings=True), tmp_path)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other(**batch("llama")).logits, model(**batch("llama")).logits)


def test_a_loaded_adapter_trains_on(saved, tiny, batch):
    folder, _ = saved
    model = load(tiny("llama"), folder)
    model(**batch("llama")).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_saving_again_replaces_the_adapter(saved, tiny, batch, redraw):
    folder, logits = saved
    model = redraw(LoRA(r=2, target_modules=("k_proj",)).attach(tiny("llama")), seed=9)
    save(model, folder)
    after = load(tiny("llama"), folder)(**batch("llama")).logits
    assert torch.equal(after, model(**batch("llama")).logits)
    assert not torch.equal(after, logits)


@pytest.mark.parametrize("stop_at", [FILE, "adapter.json"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_save_leaves_one_whole_adapter(
    saved, tiny, batch, redraw, monkeypatch, stop_at, moment
):
    folder, logits = saved
    model = redraw(LoRA(r=2, target_modules=("k_proj",)).attach(tiny("llama")), seed=9)
    calls = []
    real = getattr(storage.os, moment)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == (1 if stop_at == FILE else 2):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(f"pefttutor.saving.files.os.{moment}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    monkeypatch.undo()
    expected = logits if stop_at == FILE else model(**batch("llama")).logits
    agree = contextlib.nullcontext() if stop_at == FILE else pytest.warns(UserWarning, match="was it edited")
    with agree:
        again = load(tiny("llama"), folder)
    assert torch.equal(again(**batch("llama")).logits, expected)
    assert sorted(entry.name for entry in folder.iterdir()) == ["adapter.json", FILE]


def test_a_plain_a_merged_or_a_wrapped_model_is_not_saved(tiny, tmp_path):
    model, method = tiny("llama"), LoRA()
    with pytest.raises(ValueError, match="no method is attached to this model"):
        save(model, tmp_path / "a")
    method.attach(model)
    with pytest.raises(ValueError, match="attached to the part '0' of this model: pass that part"):
        save(nn.Sequential(model), tmp_path / "a")
    pefttutor.merge(model)
    with pytest.raises(RuntimeError, match=r"merged.*unmerge"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    pefttutor.unmerge(model)
    save(model, tmp_path / "a")


# ---- the base ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(saved, tiny, batch, dtype):
    folder, logits = saved
    model = load(tiny("llama", dtype=dtype), folder)
    torch.testing.assert_close(model(**batch("llama")).logits.float(), logits, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "embed_tokens.weight has other values"),
        ({"seed": 1, "dtype": torch.bfloat16}, "embed_tokens.weight has other values"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is too much"),
        ({"intermediate_size": 41}, r"gate_proj.weight has the shape \[41, 24\], not \[40, 24\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight is missing"),
    ],
)
def test_another_base_is_refused_with_what_differs(saved, tiny, change, message):
    model = tiny("llama", **change)
    before = picture(model)
    with pytest.raises(ValueError, match=f"trained on another base model.*{message}"):
        load(model, saved[0])
    assert picture(model) == before


def test_one_changed_layer_is_enough(saved, tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.001)
    with pytest.raises(
        ValueError, match=r"In this one model.layers.1.mlp.up_proj.weight has other values\. "
    ):
        load(model, saved[0])


# ---- files that aren't adapters ----


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(path):
    path.write_bytes(path.read_bytes()[:50])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not tensors " * 20)


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)


def newer(path):
    rewrite(path, format=99)


def unknown_method(path):
    rewrite(path, method="Popen")


def dotted_method(path):
    rewrite(path, method="storage.os.system")


def unknown_field(path):
    rewrite(path, fields={"rr": 3})


def impossible_field(path):
    rewrite(path, fields={"r": -3})


def wrong_type_of_field(path):
    rewrite(path, fields={"r": 3, "lora_alpha": "much"})


def other_rank(path):
    rewrite(path, fields={"r": 2})


def other_targets(path):
    rewrite(path, fields={"r": 3, "target_modules": ["q_proj", "k_proj"]})


def no_base(path):
    rewrite(path, base=None)


def unreadable_description(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata={"pefttutor": "{"})


def endless_description(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, metadata={"pefttutor": "[" * 100_000})


def impossible_number(path):
    rewrite(path, fields={"r": 3, "lora_alpha": 10**400})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged or not a safetensors file"),
        (truncate_header, "is damaged or not a safetensors file"),
        (empty, "is damaged or not a safetensors file"),
        (text, "is damaged or not a safetensors file"),
        (foreign, "wasn't written by pefttutor.save"),
        (newer, "isn't of format 1"),
        (unreadable_description, "its description isn't JSON"),
        (endless_description, "its description isn't JSON"),
        (impossible_number, "a description that doesn't fit LoRA"),
        (unknown_method, "is for the method 'Popen'; this pefttutor has .*LoRA"),
        (dotted_method, "is for the method 'storage.os.system'"),
        (unknown_field, "a description that doesn't fit LoRA: .*rr"),
        (impossible_field, "a description that doesn't fit LoRA: r is -3"),
        (wrong_type_of_field, "a description that doesn't fit LoRA"),
        (no_base, "its description lacks the method's fields or the base"),
        (other_rank, r"doesn't hold what its method needs: .*lora_A has the shape \(3, 24\), not \(2, 24\)"),
        (other_targets, "doesn't hold what its method needs: .*k_proj.lora_A is missing"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_the_model_untouched(saved, tiny, batch, damage, message):
    folder, _ = saved
    damage(folder / FILE)
    model, inputs = tiny("llama"), batch("llama")
    model(**inputs).loss.backward()
    before, logits = picture(model), model(**inputs).logits
    with pytest.raises(ValueError, match=message) as error:
        load(model, folder)
    assert str(folder / FILE) in str(error.value)
    assert picture(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_a_missing_folder_or_file_says_what_is_there(saved, tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder doesn't exist"):
        load(tiny("llama"), tmp_path / "nowhere")
    (saved[0] / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"the folder has \['adapter.json'\]"):
        load(tiny("llama"), saved[0])


def test_the_readable_copy_is_never_read_but_compared(saved, tiny, batch):
    folder, logits = saved
    (folder / "adapter.json").write_text("{")
    with pytest.warns(UserWarning, match=r"adapter\.json says something else .*: was it edited\?"):
        model = load(tiny("llama"), folder)
    assert torch.equal(model(**batch("llama")).logits, logits)


def test_an_adapted_model_takes_no_second_adapter(saved, tiny):
    model = LoRA(r=2).attach(tiny("llama"))
    before = picture(model)
    with pytest.raises(ValueError, match="already adapted"):
        load(model, saved[0])
    assert picture(model) == before
