"""The memory widget, driven through its controls; what is drawn is compared with the estimate itself."""

from itertools import pairwise

import matplotlib
import pytest

import pefttutor
from pefttutor import widgets
from pefttutor.memory import GIB, estimate
from pefttutor.widgets import memory_settings
from pefttutor.widgets.memory_figures import COLOURS
from pefttutor.widgets.memory_settings import GPUS, METHODS, MODELS, PRECISIONS, Setting, advice, needs

FULL, QUERY_VALUE, EVERY, *_ = METHODS
START = {"model": "GPT-2", "length": 128, "gpu": "T4"}

# Numbers that the models' cards state, or their checkpoints hold.
VALUES = {
    "GPT-2": 124_439_808,
    "Llama-2-7B": 6_738_415_616,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-2-70B": 68_976_648_192,
    "BLOOM-7B1": 7_069_016_064,
    "T5-3B": 2_851_598_336,
    "ViT-L/16": 304_326_632,
}


def heights(figure, bar):
    """{colour: GiB} of one stacked bar."""
    found = {}
    for patch in figure.axes[0].patches:
        if round(patch.get_x() + patch.get_width() / 2) == bar:
            colour = matplotlib.colors.to_hex(patch.get_facecolor()).upper()
            found[colour] = found.get(colour, 0) + patch.get_height()
    return found


def words(figure):
    return [text.get_text() for text in figure.axes[1].texts]


def expected(breakdown):
    parts = {
        "weights": breakdown.weights,
        "adapter weights": breakdown.adapter_weights,
        "gradients": breakdown.gradients,
        "optimizer": breakdown.optimizer,
        "activations": sum(breakdown.activations.values()),
    }
    return {COLOURS[part]: pytest.approx(size / GIB) for part, size in parts.items() if size}


def test_the_bars_are_the_estimate_of_what_the_controls_say():
    explorer = widgets.memory(**START)
    explorer.controls["length"].value = 512
    explorer.controls["batch_size"].value = 4
    explorer.controls["attention"].value = "eager"
    explorer.controls["optimizer"].value = "momentum"
    explorer.controls["checkpointing"].value = True
    explorer.controls["precision"].value = "float32"
    assert explorer.error is None
    setting = {"batch_size": 4, "sequence_length": 512, "attention": "eager", "optimizer": "momentum"}
    for bar, name in enumerate((FULL, QUERY_VALUE)):
        own = estimate(MODELS["GPT-2"](), METHODS[name], gradient_checkpointing=True, **setting)
        assert heights(explorer.figure, bar) == expected(own)
        total = f"{own.total / GIB:.2f} GiB"
        assert total in [text.get_text() for text in explorer.figure.axes[0].texts]
    assert f"{own.trained / 1e6:,.1f} million" in words(explorer.figure)


def test_every_control_changes_the_picture_or_the_verdict():
    explorer = widgets.memory(**START)
    moves = {"model": "BERT-large", "method": EVERY, "precision": "float32", "batch_size": 8, "length": 256}
    moves |= {"optimizer": "sgd", "attention": "eager", "checkpointing": True, "gpu": "A100 80 GB"}
    assert set(moves) == set(explorer.controls)
    for name, value in moves.items():
        before = explorer.png
        explorer.controls[name].value = value
        assert explorer.error is None
        assert explorer.png != before, name


def test_the_lines_are_the_gpus_and_their_names_never_overlap():
    figure = widgets.memory.figure(model="Llama-2-7B", method=FULL, gpu="A100 80 GB")
    lines = sorted({line.get_ydata()[0] for line in figure.axes[0].lines})
    assert lines == sorted(set(GPUS.values())) == [14.6, 23.6, 79.1]
    assert "A100 80 GB, H100: 79.1 GiB" in [text.get_text() for text in figure.axes[0].texts]
    crowded = widgets.memory.figure(model="Llama-2-70B", method=FULL, gpu="T4")
    named = [text.get_text() for text in crowded.axes[0].texts if ":" in text.get_text()]
    assert named == ["T4: 14.6 GiB", "A100 80 GB, H100: 79.1 GiB"]
    assert len(crowded.axes[0].lines) == len(named)  # no line without a name


@pytest.mark.parametrize(
    ("gpu", "shown"), [("T4", [14.6]), ("RTX 4090", [14.6, 23.6]), ("A100 80 GB", [14.6, 23.6, 79.1])]
)
def test_a_gpu_far_above_the_bars_does_not_press_them_flat(gpu, shown):
    small = widgets.memory.figure(model="GPT-2", method=FULL, gpu=gpu)
    assert sorted(line.get_ydata()[0] for line in small.axes[0].lines) == shown
    of_the_lesson = widgets.memory.figure(model="Llama-2-7B", method=FULL, gpu=gpu)
    assert sorted(line.get_ydata()[0] for line in of_the_lesson.axes[0].lines) == [14.6, 23.6, 79.1]
    assert of_the_lesson.axes[0].get_ylim()[1] > 79.1


def test_the_verdict_follows_from_what_is_seen():
    figure = widgets.memory.figure(model="Llama-2-7B", method=FULL, gpu="RTX 4090")
    too_much = needs(Setting("Llama-2-7B", FULL), METHODS).total / GIB - (GPUS["RTX 4090"] - 1)
    title = figure.axes[0].get_title(loc="left")
    assert title.splitlines()[0] == f"Llama-2-7B: {too_much:.1f} GiB too much for the RTX 4090"
    for words_seen in (title, figure.alt):
        assert "(23.6 GiB less 1 GiB set aside)" in words_seen


def test_the_list_stands_as_the_bar_is_stacked_and_its_keys_are_the_bands():
    figure = widgets.memory.figure(model="Llama-2-7B", method=EVERY, length=4096, gpu="T4")
    own = needs(Setting("Llama-2-7B", EVERY, length=4096), METHODS).as_dict()
    stacked = [part.removeprefix("activations: ") for part, size in own.items() if size > 0.005 * GIB]
    assert [word.strip() for word in words(figure) if word.strip() in stacked] == stacked[::-1]
    green = matplotlib.colors.to_rgb(COLOURS["activations"])
    bands = [patch.get_facecolor() for patch in figure.axes[0].patches if round(patch.get_x() + 0.3) == 1]
    tints = [band[3] for band in bands if band[:3] == green]
    assert len(tints) > 3
    assert all(abs(one - other) > 0.1 for one, other in pairwise(tints))
    keys = [text.get_alpha() for text in figure.axes[1].texts if text.get_text() == "■"]
    assert set(keys) <= {1.0, *tints}
    assert len(set(keys)) > 2


def test_advice_is_computed_and_what_it_promises_holds():
    setting = Setting("Llama-2-7B", FULL)
    found = advice(setting, METHODS, GPUS["RTX 4090"])
    assert [change.words for change in found if change.fits] == [QUERY_VALUE]
    assert found[0].total == needs(Setting("Llama-2-7B", QUERY_VALUE), METHODS).total
    assert [change.total for change in found] == sorted(change.total for change in found)
    assert advice(Setting("Llama-2-7B", QUERY_VALUE), METHODS, GPUS["RTX 4090"]) == []


def test_the_batch_advised_is_the_largest_that_fits():
    setting = Setting("GPT-2", FULL, "float32", batch_size=64)
    batch = next(
        change for change in advice(setting, METHODS, GPUS["T4"]) if change.words.startswith("batch")
    )
    assert batch.words == "batch 16 (accumulate gradients)"
    assert batch.fits
    assert needs(Setting("GPT-2", FULL, "float32", batch_size=32), METHODS).total > 13.6 * GIB


def test_several_changes_together_when_none_is_enough():
    setting = Setting("Llama-2-7B", FULL, "float32", batch_size=4, length=1024)
    *single, together = advice(setting, METHODS, GPUS["T4"])
    assert not any(change.fits for change in single)
    assert together.fits
    assert together.words.split(" + ")[0] == "bfloat16 throughout"
    assert together.total <= 13.6 * GIB
    figure = widgets.memory.figure(
        model="Llama-2-7B", method=FULL, precision="float32", batch_size=4, length=1024, gpu="T4"
    )
    assert f"To make it fit: {together.words}" in figure.alt
    assert any(text.startswith("✓") for text in words(figure))


def test_nothing_is_enough_for_a_model_that_is_too_large():
    figure = widgets.memory.figure(model="Llama-2-70B", gpu="T4")
    assert "Nothing here is enough: more GPUs." in words(figure)
    assert "No change here is enough." in figure.alt


def test_four_bits_under_full_fine_tuning_is_refused_where_the_reader_looks():
    explorer = widgets.memory(**START)
    explorer.controls["precision"].value = list(PRECISIONS)[-1]
    assert explorer.error is None
    explorer.controls["method"].value = FULL
    assert "a quantised weight can" in explorer._message.value
    explorer.controls["method"].value = QUERY_VALUE
    assert explorer.error is None
    inside = 12 * 12 * 768**2  # GPT-2's matrices: 4 d² of attention and 8 d² of feed-forward a layer
    assert heights(explorer.figure, 0)[COLOURS["quantised weights"]] == pytest.approx(
        inside * 4.127 / 8 / GIB, rel=1e-3
    )


def test_own_methods_can_be_shown():
    method = pefttutor.LoRA(r=2, target_modules=("c_attn",))
    figure = widgets.memory.figure(model="GPT-2", methods={"mine": method}, gpu="T4")
    assert heights(figure, 0) == expected(needs(Setting("GPT-2", "mine"), {"mine": method}))


@pytest.mark.parametrize("model", [name for name in MODELS if name != "BERT-large"])
def test_the_models_have_the_published_size(model):
    assert needs(Setting(model, FULL, length=128), METHODS).values == VALUES[model]
    every = needs(Setting(model, EVERY, length=128), METHODS)
    assert every.trained > 2 * needs(Setting(model, QUERY_VALUE, length=128), METHODS).trained


def test_bad_input():
    with pytest.raises(ValueError, match="model is 'GPT-5'; it can be GPT-2, BERT-large"):
        widgets.memory(model="GPT-5")
    with pytest.raises(ValueError, match="no control is called 'rank'; there are model, method"):
        widgets.memory.figure(rank=3)
    with pytest.raises(ValueError, match="gpu is 'abacus'"):
        widgets.memory(gpu="abacus")
    explorer = widgets.memory(**START)
    explorer.controls["length"].value = 2048
    assert "positions for 1024 tokens" in explorer._message.value


def test_a_setting_is_estimated_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        memory_settings, "estimate", lambda *given, **more: calls.append(1) or estimate(*given, **more)
    )
    memory_settings._needs.cache_clear()
    explorer = widgets.memory(**START)
    explorer.controls["length"].value = 256
    seen = len(calls)
    explorer.controls["length"].value = 128
    assert len(calls) == seen


def test_what_is_computed_is_said_where_a_model_has_one_attention_only():
    figure = widgets.memory.figure(model="BLOOM-7B1", attention="sdpa")
    assert "BLOOM-7B1 has eager attention only" in figure.alt
    assert "attention only" not in widgets.memory.figure(model="Llama-2-7B", attention="sdpa").alt


def test_the_numbers_are_in_the_caption_for_who_cannot_see_the_picture():
    found = needs(Setting(model="GPT-2", method=FULL), METHODS)
    alt = widgets.memory.figure(model="GPT-2", method=FULL).alt
    for part in ("weights", "gradients", "optimizer"):
        assert f"{part} {getattr(found, part) / GIB:.2f}" in alt
    assert f"activations {sum(found.activations.values()) / GIB:.2f}" in alt


def test_a_method_of_ones_own_may_hold_lists():
    own = {"biases": pefttutor.BitFit(modules_to_save=["lm_head"])}
    assert "biases" in widgets.memory.figure(model="GPT-2", methods=own).alt


def test_the_longest_advice_is_written_out():
    setting = {"method": EVERY, "length": 4096, "batch_size": 4, "attention": "eager", "gpu": "T4"}
    setting |= {"model": "Llama-2-7B", "precision": "bfloat16, Adam and master copy in float32"}
    shown = " ".join(word.strip(" ✓") for word in words(widgets.memory.figure(**setting)))
    last = advice(Setting(**{k: v for k, v in setting.items() if k != "gpu"}), METHODS, GPUS["T4"])[-1]
    assert last.words.split(" + ")[0] == "fused attention"
    for part in last.words.split(" + "):
        assert part.split()[0] in shown
    assert "fused attention + bfloat16" in shown
