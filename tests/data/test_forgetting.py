"""The held-out loss of the world, against the model's own loss and by what happens to it in training."""

import copy
import math

import pytest
import torch

import pefttutor
from pefttutor import data, models
from pefttutor.data.forgetting import held_out_loss
from tests.cases import moved
from tests.tiny import bert, llama_classifier


@pytest.fixture(scope="module")
def speaker():
    return models.load("campus-nano")


def test_it_is_the_models_own_loss_on_each_text_weighed_by_its_tokens(speaker):
    model, words = speaker
    total, count = 0.0, 0
    for row in data.load("world_text")["test"]:
        ids = torch.tensor([words(row["answer"])["input_ids"] + [words.eos_token_id]])[:, :256]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert held_out_loss(model, words) == pytest.approx(total / count, rel=1e-4)
    assert 2.5 < math.exp(total / count) < 3.5  # what data/README.md says of unseen text of the world


def test_a_classifier_is_asked_through_its_embeddings(speaker):
    model, words = speaker
    classifier, _ = models.load("campus-nano", head="classification", num_labels=2)
    classifier.train()
    assert held_out_loss(classifier, words, batch_size=7) == pytest.approx(
        held_out_loss(model, words), rel=1e-4
    )
    assert classifier.training


def with_languages(head: str, **settings):
    """Two that have learned something, and the same below each head."""
    model = models.load("campus-nano", head=head, **settings)[0]
    for name in ("velan", "german"):
        pefttutor.InvertibleAdapter(bottleneck=8).attach(model, name=name)
    return moved(model)


@pytest.mark.parametrize("names", [("german",), ("velan", "german")])
def test_before_the_embeddings_are_a_head_what_has_changed_them_is_taken_back(speaker, names):
    model, words = pefttutor.switch(with_languages("lm"), *names), speaker[1]
    own = held_out_loss(model, words)
    classifier = pefttutor.switch(with_languages("classification", num_labels=2), *names)
    assert held_out_loss(classifier, words) == pytest.approx(own, rel=1e-4)
    model.get_output_embeddings()._forward_pre_hooks.clear()
    assert abs(held_out_loss(model, words) - own) > 0.1, "taking nothing back would change nothing"


def test_what_a_task_makes_a_model_forget_is_seen(speaker):
    model, words = copy.deepcopy(speaker[0]), speaker[1]
    before = held_out_loss(model, words)
    train = data.encode(data.load("velan_text")["train"].select(range(64)), words)
    pefttutor.LoRA(r=4, target_modules=("q_proj", "v_proj")).attach(model)
    pefttutor.fit(model, train, steps=12, lr=3e-2)
    after = held_out_loss(model, words)
    assert after > before + 0.05
    pefttutor.detach(model)
    assert held_out_loss(model, words) == before


@pytest.mark.parametrize("make", [bert, lambda: llama_classifier(tie_word_embeddings=False)])
def test_who_cannot_be_asked_is_refused(make, speaker):
    with pytest.raises(ValueError, match=r"can't be asked for the next word; expected a causal"):
        held_out_loss(make(), speaker[1])


def test_a_body_that_sees_what_comes_later_is_refused(speaker):
    model, words = models.load("campus-encoder", head="classification", num_labels=2)[0], speaker[1]
    with pytest.raises(ValueError, match=r"BertForSequenceClassification can't be asked"):
        held_out_loss(model, words)
