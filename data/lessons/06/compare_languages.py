"""Appendix 06b: MAD-X in the little world. Does a task in Velan gain from an adapter that knows the language?

    python data/lessons/06/compare_languages.py        goes on where it was stopped

The language is learned once, by campus-nano as a language model, from the 1,000 texts of velan_text: an invertible
adapter and Pfeiffer's adapters, with the sizes of the paper for a width of 128 (32 and 64 features in the middle), for
250 steps of 16 at one rate, which wasn't searched. Then all of it is frozen, and a task adapter of 8 features with a
new head learns velan_topic from 256 examples above it, for 120 steps of 16. Ways:

alone       the task adapter and its head, without a language
velan       above the language
shuffled    above a language whose numbers stand in another order within each tensor, which the seed draws: as large,
            and it knows nothing

A seed draws the examples, their order and the task adapter. Five other seeds search the learning rate on the validation
split, on 1, 2, 5, 10, …, in a window that is widened as long as the best lies at its edge. "perplexity" is that of the
language model with this language on unseen Velan. Appendix 06b reads the table, compare_languages.jsonl.
"""

import copy
import math
from functools import cache

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

MODEL, CASE, STEPS, BATCH, SEARCH = "campus-nano", ("velan_topic", 256), 120, 16, range(100, 105)
RATES, WINDOW = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1], (5e-3, 2e-2)
LANGUAGE = {"text": "velan_text", "steps": 250, "rate": 1e-2, "bottleneck": 64}


def with_language(model):
    """The model with an invertible adapter and Pfeiffer's adapters, which both train."""
    pefttutor.InvertibleAdapter().attach(model, name="words")
    how = {"placement": "pfeiffer", "bottleneck": LANGUAGE["bottleneck"], "activation": "relu"}
    return pefttutor.Adapter(**how).attach(model, name="language")


@cache
def speaking():
    """The language model, its tokens, and unseen Velan."""
    model, words = pefttutor.models.load(MODEL)
    return model, words, pefttutor.data.encode(pefttutor.data.load(LANGUAGE["text"])["test"], words)[:60]


@cache
def learned(text):
    """What campus-nano learns of a text's language, by the names of its tensors, which a classifier has as well."""
    model, words, _ = speaking()
    model = with_language(copy.deepcopy(model))
    texts = pefttutor.data.encode(pefttutor.data.load(text)["train"], words)
    pefttutor.fit(model, texts, steps=LANGUAGE["steps"], batch_size=BATCH, lr=LANGUAGE["rate"], seed=0)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "@" in name}


def values(way, seed):
    """The language of a way; what the seed shuffles is drawn tensor by tensor."""
    tensors, draw = learned(LANGUAGE["text"]), torch.Generator().manual_seed(seed)
    if way == "velan":
        return tensors
    return {
        name: t.flatten()[torch.randperm(t.numel(), generator=draw)].view_as(t) for name, t in tensors.items()
    }


def perplexity(way, seed):
    """Of the language model on unseen Velan."""
    model, _, heard = speaking()
    if way != "alone":
        model = with_language(copy.deepcopy(model))
        model.load_state_dict(values(way, seed), strict=False)
    return math.exp(pefttutor.evaluate(model, heard, batch_size=32)["loss"])


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    if way != "alone":
        with_language(model).load_state_dict(values(way, seed), strict=False)
    how = {"placement": "pfeiffer", "bottleneck": 8, "activation": "relu", "modules_to_save": ("score",)}
    pefttutor.Adapter(**how, init_seed=seed).attach(model, name="task")
    pefttutor.switch(model, *pefttutor.attached(model), train=("task",))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    found = {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    if seed in SEARCH:  # the search looks at nothing else
        return found
    return found | {
        "test": pefttutor.evaluate(model, splits["test"])["accuracy"],
        "perplexity": perplexity(way, seed),
    }


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*CASE, way): WINDOW for way in ("alone", "velan", "shuffled")},
        columns=("task", "n", "way"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[CASE[0], LANGUAGE["text"]],
        steps=STEPS,
        batch_size=BATCH,
        language=LANGUAGE,
    )
