"""What a label predicts: found by running the model, whatever its class is called, and without a trace."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from pefttutor.data.targets import IGNORED, aligned, count_targets, predicts_next, weighted
from tests.data import unusual
from tests.tiny import bert, llama, llama_classifier


def with_picture() -> dict[str, torch.Tensor]:
    batch = unusual.words(2, 9)
    batch["input_ids"][:, 1:5] = unusual.PICTURE
    batch["labels"][:, :5] = IGNORED
    return batch | {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def with_sound() -> dict[str, torch.Tensor]:
    sound = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    return {"input_features": sound, "labels": unusual.words(2, 5)["labels"]}


def short_answers() -> dict[str, torch.Tensor]:
    return unusual.words(3, 9) | {"labels": unusual.words(3, 4, prompt=0, seed=1)["labels"]}


def silent_head() -> Any:
    """All logits are equal, whatever is read: every mean cross-entropy is log 50, shifted or not."""
    model = unusual.decoder()
    nn.init.zeros_(model.lm_head.weight)
    return model


MODELS = {
    "llama": (unusual.decoder, unusual.words, True),
    "bart": (unusual.bart, unusual.words, False),
    "bart to bart": (lambda: unusual.bart("ForConditionalGeneration"), short_answers, False),
    "t5": (unusual.t5, short_answers, False),
    "bert": (lambda: unusual.lively(bert()), unusual.words, False),
    "xlm": (unusual.xlm, unusual.words, False),
    "gemma with pictures": (unusual.gemma_with_pictures, unusual.words, True),
    "llava": (unusual.llava, with_picture, True),
    "whisper": (unusual.whisper, with_sound, False),
    "label smoothing": (unusual.smoothed, unusual.words, True),
    "a head of zeros": (silent_head, unusual.words, True),
    "logits capped": (lambda: unusual.decoder("Gemma2"), unusual.words, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_which_label_moves_the_models_own_loss(name: str) -> None:
    make, batch_of, shifted = MODELS[name]
    model, batch = make(), batch_of()
    assert predicts_next(model, batch) is shifted
    labels, found = batch["labels"], []
    labels[:, 0] = 7
    for first in (7, 8):  # by the definition: the first label has no prediction where labels are shifted
        with torch.no_grad():
            labels[:, 0] = first
            found.append(model(**batch).loss.item())
    if name != "a head of zeros":
        assert (found[0] == found[1]) is shifted


@pytest.mark.parametrize(
    "name", ["llama", "bart", "t5", "bert", "xlm", "gemma with pictures", "label smoothing"]
)
def test_without_a_batch_three_tokens_are_enough(name: str) -> None:
    make, _, shifted = MODELS[name]
    assert predicts_next(make()) is shifted


def test_where_nothing_can_be_seen_the_name_decides() -> None:
    class UnwillingForCausalLM(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not like this")

    model = UnwillingForCausalLM(llama().config)
    assert predicts_next(model)
    assert predicts_next(model, unusual.words())
    assert not predicts_next(nn.Linear(2, 2))
    assert not predicts_next(object())


def test_labels_of_whole_texts_predict_no_token() -> None:
    assert not predicts_next(llama_classifier(), unusual.words() | {"labels": torch.tensor([0, 1, 1])})
    assert not predicts_next(llama_classifier(), unusual.words() | {"labels": torch.rand(3, 3)})


def test_asking_leaves_no_trace() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    model.register_forward_pre_hook(
        lambda *_: torch.manual_seed(7) and None
    )  # some models draw when evaluated
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert predicts_next(model)
    assert torch.equal(torch.rand(2), drawn)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    classifier = llama_classifier()
    before = dict(vars(classifier.config))
    assert not predicts_next(classifier, unusual.words() | {"labels": torch.tensor([[0, 1, 1]] * 3)})
    assert (
        dict(vars(classifier.config)) == before
    )  # transformers notes there of which kind the first labels were


def test_inside_autocast_asking_leaves_no_casts_of_the_weights_as_they_were() -> None:
    model, batch = llama(), unusual.words()
    with torch.autocast("cpu", torch.bfloat16):
        predicts_next(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(50)
        found = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch).loss, found)


def test_a_model_is_asked_once_and_again_when_its_settings_change() -> None:
    model, calls = llama(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    predicts_next(model)
    asked = len(calls)
    assert 0 < asked <= 5
    predicts_next(model)
    predicts_next(model, unusual.words())
    assert len(calls) == asked
    model.loss_function = lambda logits, labels, **_: cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )
    assert not predicts_next(model)
    assert len(calls) > asked
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("shifted", [True, False])
def test_what_belongs_together_gives_the_models_own_loss(shifted: bool) -> None:
    model = unusual.decoder() if shifted else unusual.bart()
    batch = unusual.words()
    output = model(**batch)
    logits, labels = aligned(output.logits, batch["labels"], shifted=shifted)
    assert logits.shape[:2] == labels.shape
    torch.testing.assert_close(cross_entropy(logits.flatten(0, 1), labels.flatten()), output.loss)
    assert int((labels != IGNORED).sum()) == count_targets(batch, shifted=shifted)


def test_virtual_tokens_in_front_predict_the_first_label() -> None:
    logits, labels = torch.zeros(1, 5, 9), torch.tensor([[4, 5, 6]])
    assert aligned(logits, labels, shifted=True)[1].tolist() == [[IGNORED, 4, 5, 6, IGNORED]]
    assert aligned(logits[:, :3], labels, shifted=True)[1].tolist() == [[5, 6, IGNORED]]
    assert aligned(logits[:, :2], labels, shifted=True)[1].tolist() == [[6, IGNORED]]
    with pytest.raises(ValueError, match="logits have 5 positions, labels 3"):
        aligned(logits, labels, shifted=False)
    classes = torch.zeros(2, 3), torch.tensor([0, 2])
    assert aligned(*classes, shifted=True) == classes


def test_a_model_with_virtual_tokens_shifts() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert predicts_next(peft.get_peft_model(unusual.decoder(), config), unusual.words())


def test_parts_without_a_target_are_left_out_of_the_mean() -> None:
    first, second = torch.full((2, 4), IGNORED), torch.full((2, 4), IGNORED)
    first[0, 1:] = 3
    second[0, 0] = 3  # counts only where labels aren't shifted
    batches = [{"labels": first}, {"labels": second}]
    assert weighted(batches, shifted=True) == [(batches[0], 1.0)]
    assert [share for _, share in weighted(batches, shifted=False)] == [0.75, 0.25]
    with pytest.raises(
        ValueError, match="nothing to learn from: all labels of this step are -100 after the first"
    ):
        weighted(batches[1:], shifted=True)
