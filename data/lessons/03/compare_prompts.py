"""Lesson 03: a prompt of 8 virtual tokens, with a new head beside it, on few examples of two tasks, over ten seeds.

    python data/lessons/03/compare_prompts.py        goes on where it was stopped

The prompt in front of campus-nano and the new head train for 120 steps of 16; the prompt starts as words drawn from the
vocabulary. A seed draws the examples, their order and these words. Learning rates lie on 1, 3, 10, …: five other seeds
try the first window, which is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 03 reads the table, compare_prompts.jsonl. Full fine-tuning and the frozen model with a converged head, on the
same examples, stand in compare_masks.jsonl of lesson 09.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH, TOKENS = "campus-nano", ("score",), 120, 16, 8
CASES, WINDOW, SEARCH = [("verdicts", 64), ("animals", 256)], (3e-2, 3e-1), range(100, 105)
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0]


def prompted(name, task, n, tokens, lr, seed):
    """The embedded model of this name, with a prompt and a head that have learnt from the n examples of a seed."""
    model = copy.deepcopy(prepared(name, task)[0])
    pefttutor.PromptTuning(num_virtual_tokens=tokens, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(name, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return model


def judged(model, name, task, seed):
    """All of `scores`; or, where a seed only searches for a rate, the accuracy on validation."""
    if seed not in SEARCH:
        return scores(model, name, task)
    return {"validation": pefttutor.evaluate(model, prepared(name, task)[1]["validation"])["accuracy"]}


def train(task, n, lr, seed):
    """Train a prompt; what `judged` says of it."""
    return judged(prompted(MODEL, task, n, TOKENS, lr, seed), MODEL, task, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        dict.fromkeys(CASES, WINDOW),
        columns=("task", "n"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
    )
