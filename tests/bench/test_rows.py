"""The rows of the benchmark: every side does the same work, where it is told to."""

import pytest
import torch
import transformers

from pefttutor.bench import discover
from pefttutor.bench.memory import kept_bytes, state_bytes
from pefttutor.bench.protocol import difference


@pytest.mark.parametrize("p", [0.3, 0.1, 0.005])
def test_all_sides_of_the_sparse_rows_do_the_same_work_and_ours_keeps_no_more_than_p(monkeypatch, p):
    from pefttutor.bench.rows import sparse_adamw

    monkeypatch.setattr(sparse_adamw, "SHAPE", (40, 50))
    ours = sparse_adamw.build("ours", 0, "cpu", p=p, stock=False)
    mask, stock = (sparse_adamw.build("peer", 0, "cpu", p=p, stock=stock) for stock in (False, True))
    for _ in range(3):
        after = ours()
        assert difference(after, mask())[0] == 0
        assert difference(after, stock())[0] == 0
    assert discover()[f"sparse_adamw_{p:g}"].goals["state"] == p
    assert 0 < state_bytes(ours) <= p * state_bytes(mask)


def test_every_row_of_the_folder_is_found_and_two_of_one_name_are_refused(monkeypatch):
    rows = discover()
    assert {
        "lora_linear_768x768_t2048_r8",
        "lora_linear_2048x2048_t1024_r16",
        "lora_step",
        "head_loss",
    } <= set(rows)
    from pefttutor.bench.rows import head_loss, whole_step

    monkeypatch.setattr(head_loss, "ROWS", whole_step.ROWS)
    with pytest.raises(ValueError, match="two rows are called 'lora_step'"):
        discover()


@pytest.mark.parametrize("shape", [{"inputs": 12, "outputs": 20, "tokens": 32, "r": 4}])
def test_both_sides_of_the_linear_row_do_the_same_work(shape):
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows.lora_linear import build

    ours, peer = build("ours", 3, "cpu", **shape)(), build("peer", 3, "cpu", **shape)()
    assert set(ours) == {"y", "x", "lora_A", "lora_B"}
    assert difference(ours, peer)[0] < 1e-5
    assert difference(ours, build("peer", 4, "cpu", **shape)())[0] > 0.1  # another seed, other weights


def tiny_llama(seed):
    """In the place of the rows' own model."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, use_cache=False)
    return transformers.LlamaForCausalLM(config).train()


STEPS = {
    "lora": 8,
    "dora": 12,
    "adalora": 12,
    "prefix": 1,
    "prefix_mlp": 5,
    "adapter": 8,
}  # tensors of two layers


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", STEPS)
def test_all_sides_of_the_step_rows_do_the_same_work(monkeypatch, kind):
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows import whole_step

    monkeypatch.setattr(whole_step, "llama_like", tiny_llama)
    monkeypatch.setattr(whole_step, "SEQUENCE", 6)
    ours, peer = (whole_step.build(side, 0, "cpu", kind=kind)() for side in ("ours", "peer"))
    assert len(ours) == 1 + STEPS[kind]  # the loss, too
    assert difference(ours, peer)[0] < 1e-4
    assert whole_step.build("bound", 0, "cpu", kind=kind)() == {}
    assert discover()[f"{kind}_step"].goals["time"] < 1


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_both_sides_of_the_head_rows_do_the_same_work(monkeypatch, chunk, ignored):
    from pefttutor.bench.rows import head_loss

    monkeypatch.setattr(head_loss, "TOKENS", 12)
    monkeypatch.setattr(head_loss, "VOCABULARY", 50)
    if chunk and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        with pytest.raises(ImportError, match=r"has no F.linear_cross_entropy, 2.13 has"):
            head_loss.build("peer", 0, "cpu", ignored=ignored, chunk=chunk)
        return
    ours, peer = (head_loss.build(side, 0, "cpu", ignored=ignored, chunk=chunk) for side in ("ours", "peer"))
    assert difference(ours(), peer())[0] < 1e-5


def test_all_sides_of_the_lessons_step_do_the_same_work():
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows import lesson_step

    ours, peer = (lesson_step.build(side, 0, "cpu", model_name="campus-nano") for side in ("ours", "peer"))
    found = ours()
    assert len(found) == 2 + 4 * 2 * 2  # the loss, the head; two factors of two projections in four layers
    assert difference(found, peer())[0] < 1e-4
    before = found["loss"]
    assert all(ours()["loss"] != before for _ in range(2))  # it is stepped
    assert lesson_step.build("bound", 0, "cpu", model_name="campus-nano")() == {}


@pytest.mark.parametrize("name", ["lora_linear_768x768_t2048_r8", "head_loss"])
def test_a_row_is_on_its_device_alone(name):
    """The meta device is one where nothing is computed, and nothing meets a tensor of the CPU."""
    for side in ("ours", "bound"):
        found = discover()[name].build(side, 0, "meta")()
        assert all(tensor.is_meta for tensor in found.values())


@pytest.mark.parametrize("adapters", [4, 8])
def test_both_sides_of_the_fusion_rows_do_the_same_work(monkeypatch, adapters):
    from pefttutor.bench.rows import fusion_attention

    monkeypatch.setattr(fusion_attention, "WIDTH", 16)
    monkeypatch.setattr(fusion_attention, "TOKENS", 6)
    ours, peer = (fusion_attention.build(side, 0, "cpu", adapters=adapters)() for side in ("ours", "peer"))
    assert set(ours) == {"y", *fusion_attention.NAMES}
    assert difference(ours, peer)[0] < 1e-5
    assert discover()[f"fusion_attention_{adapters}"].goals["time"] < 0.5


def test_both_sides_of_the_prompt_row_say_the_same_and_the_text_alone_another_thing(monkeypatch):
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows import soft_prompt

    monkeypatch.setattr(soft_prompt, "llama_like", tiny_llama)
    ours, peer, alone = (soft_prompt.build(side, 0, "cpu")() for side in ("ours", "peer", "bound"))
    assert difference(ours, peer)[0] < 1e-4
    assert difference(alone, peer)[0] > 0.01


@pytest.mark.parametrize("width", [24])
def test_both_sides_of_the_dora_rows_do_the_same_work(width):
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows import dora

    sides = [dora.build(side, 0, "cpu", width=width, tokens=32, r=4)() for side in ("ours", "peer")]
    assert set(sides[0]) == {"y", "x", "lora_A", "lora_B", "magnitude"}
    assert difference(*sides)[0] < 1e-5
    norms = [dora.build_norm(side, 0, "cpu", width=width, r=4)() for side in ("ours", "peer")]
    assert difference(*norms)[0] < 1e-5


@pytest.mark.parametrize(("work", "tensors"), [("penalty", 1 + 28), ("importance", 4), ("budget", 14)])
def test_both_sides_of_the_adalora_rows_do_the_same_work(monkeypatch, work, tensors):
    pytest.importorskip("peft", reason="HF PEFT, the peer, comes with the extra `test`")
    from pefttutor.bench.rows import adalora

    monkeypatch.setattr(adalora, "llama_like", tiny_llama)
    monkeypatch.setattr(adalora, "LONG", 30)
    ours, peer = (adalora.build(side, 0, "cpu", work=work) for side in ("ours", "peer"))
    for _ in range(12):
        found = ours()
        assert len(found) == tensors
        assert difference(found, peer())[0] < 1e-5
    if work == "budget":
        assert 0 < sum(int((values == 0).sum()) for values in found.values()) < 14 * adalora.R


def test_lora_fa_keeps_a_hundredth_of_what_lora_keeps():
    row = discover()["lora_fa"]
    ours, peer = (row.build(side, 0, "cpu") for side in ("ours", "peer"))
    assert difference(ours(), peer())[0] == 0
    assert kept_bytes(ours) == 8 * 2048 * 4  # x Aᵀ
    assert kept_bytes(ours) <= row.goals["kept"] * kept_bytes(peer)


@pytest.mark.parametrize("batch", [1, 8])
def test_both_sides_of_the_steered_rows_say_the_same_and_the_model_alone_another_thing(monkeypatch, batch):
    from pefttutor.bench.rows import steered_decode

    ours, peer, alone = (
        steered_decode.build(side, 0, "cpu", batch=batch) for side in ("ours", "peer", "bound")
    )
    first = ours()
    assert first["logits"].shape == (batch, steered_decode.TOKENS, 3072)
    for _ in range(2):  # the caches go back to the prompts
        assert difference(ours(), first)[0] == 0
        assert difference(first, peer())[0] < 1e-4
    assert difference(alone(), first)[0] > 0.01
    whole = steered_decode.build("peer", 0, "cpu", batch=batch)
    monkeypatch.setattr(steered_decode, "ALPHA", 0.0)
    assert difference(whole(), alone())[0] == 0
    assert discover()[f"steered_decode_{batch}"].goals["time"] < 1
