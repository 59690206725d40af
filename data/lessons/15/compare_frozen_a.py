"""Lesson 15: LoRA-FA, which leaves A as it was drawn and trains B alone, over ten seeds of two tasks.

    python data/lessons/15/compare_frozen_a.py        goes on where it was stopped

It adapts q_proj and v_proj of campus-nano with r = 8 and the factor α/r = 2 and trains the new head for 120 steps of
16, as LoRA does in compare_ranks.py of lesson 12. A seed draws the examples, their order and the factors A. Learning
rates lie on 1, 2, 5, 10, …: five other seeds try the first window, and more as long as the best mean accuracy on the
validation split lies at an edge.

Appendix 15c reads the table, compare_frozen_a.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.data.evaluation import evaluate

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES, WINDOW = [("verdicts", 64), ("animals", 256)], (2e-2, 5e-2)  # task, examples
SEARCH = range(100, 105)


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.LoRAFA(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": evaluate(model, prepared(MODEL, task)[1]["validation"])["accuracy"]}
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, "LoRA-FA"): WINDOW for case in CASES},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
