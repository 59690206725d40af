"""Few-shot blocks: several examples of one rule, which holds in that block only.

A rule may be an operation (last word, opposite, sorting, a sum) or a classification of sentences whose classes get fresh
label words in every block. Nothing names the rule, so the only way to predict an answer is to infer it from the examples above
it: this is what in-context learning grows from.
"""

import random
from collections.abc import Callable

from . import lexicon as lx
from . import prose, reasoning
from .facts import people, towns

Rule = Callable[[random.Random], Callable[[random.Random], tuple[str, str]]]

_TEMPLATES = ("{x} -> {y}", "{x} => {y}", "Input: {x} Output: {y}", "x: {x} y: {y}", "{x} / {y}", "Text: {x}\nClass: {y}",
              "{x} = {y}", "Given {x} say {y}", "< {x} > {y}", "{x} | {y}", "Item: {x}\nResult: {y}", "[{x}] {y}")  # fmt: skip
_JOINTS = ("\n", "\n", " ; ", "\n\n")


def _words(rng: random.Random, low: int = 2, high: int = 5) -> list[str]:
    pool = rng.choice((lx.THINGS, lx.ANIMALS, lx.COLOURS, lx.THINGS + lx.ANIMALS, lx.LETTERS, lx.JOBS))
    return rng.sample(pool, rng.randint(low, high))


def _on_words(f: Callable[[list[str]], str], low: int = 2, high: int = 5) -> Rule:
    def rule(_: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        return lambda rng: (" ".join(w := _words(rng, low, high)), f(w))

    return rule


def _on_numbers(f: Callable[[list[int]], str], low: int, high: int, top: int = 100) -> Rule:
    def rule(_: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        def draw(rng: random.Random) -> tuple[str, str]:
            numbers = rng.sample(range(top), rng.randint(low, high))
            return " ".join(map(str, numbers)), f(numbers)

        return draw

    return rule


def _mapping(pairs: list[tuple[str, str]]) -> Rule:
    return lambda _: lambda rng: rng.choice(pairs)


def _classes(make: Callable[[random.Random, int], str], n: int) -> Rule:
    """Classification with label words drawn anew for each block."""

    def rule(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        keep = block.sample(range(n), min(n, block.choice((2, 2, 3, 4))))
        labels = block.sample(lx.LABEL_WORDS, len(keep))

        def draw(rng: random.Random) -> tuple[str, str]:
            i = rng.randrange(len(keep))
            return make(rng, keep[i]), labels[i]

        return draw

    return rule


def _category(rng: random.Random, i: int) -> str:
    return rng.choice(list(lx.CATEGORIES.values())[i])


def _count_in(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(lx.THINGS, 2)
    xs = [rng.choice(words) for _ in range(rng.randint(2, 6))]
    return f"{words[0]} in {' '.join(xs)}", str(xs.count(words[0]))


def _qa(rng: random.Random) -> tuple[str, str]:
    passage, question, answer = reasoning.passage_question(rng)
    return f"{passage} {question}", answer


def _sides(rng: random.Random, i: int) -> str:
    return prose.both_registers(rng)[i]


OPERATIONS: dict[str, Rule] = {
    "first": _on_words(lambda w: w[0]),
    "last": _on_words(lambda w: w[-1]),
    "second": _on_words(lambda w: w[1]),
    "reverse": _on_words(lambda w: " ".join(reversed(w)), 2, 4),
    "sort": _on_words(lambda w: " ".join(sorted(w)), 2, 4),
    "count": _on_words(lambda w: str(len(w)), 1, 6),
    "copy": _on_words(" ".join, 1, 3),
    "twice": _on_words(lambda w: f"{w[0]} {w[0]}", 1, 1),
    "sort_numbers": _on_numbers(lambda n: " ".join(map(str, sorted(n))), 2, 5),
    "largest": _on_numbers(lambda n: str(max(n)), 2, 4),
    "smallest": _on_numbers(lambda n: str(min(n)), 2, 4),
    "sum": _on_numbers(lambda n: str(sum(n)), 2, 2, 20),
    "opposite": _mapping(lx.OPPOSITES),
    "synonym": _mapping(lx.SYNONYMS),
    "plural": _mapping(sorted(lx.PLURALS.items())),
    "category": _mapping(sorted(lx.CATEGORY_OF.items())),
    "count_in": lambda _: _count_in,
    "question": lambda _: _qa,
    "job": lambda _: lambda rng: ((p := rng.choice(people())).name, p.job),
    "town_product": lambda _: lambda rng: ((t := rng.choice(towns())).name, t.product),
}
CLASSIFICATIONS: dict[str, Rule] = {
    "topic": _classes(lambda rng, i: prose.news(rng, prose.TOPICS[i]), len(prose.TOPICS)),
    "sentiment": _classes(lambda rng, i: prose.review(rng, rng.choice(((1, 2), (4, 5))[i])), 2),
    "adjective": _classes(
        lambda rng, i: rng.choice((prose.GOOD + prose.GREAT, prose.BAD + prose.AWFUL)[i]), 2
    ),
    "kind": _classes(_category, len(lx.CATEGORIES)),
    "register": _classes(_sides, 2),
    "parity": _classes(lambda rng, i: str(2 * rng.randint(0, 49) + i), 2),
    "pronoun": _classes(lambda rng, i: rng.choice([p.first for p in people() if p.she == bool(i)][:99]), 2),
    "follows": _classes(lambda rng, i: " ; ".join(reasoning.entailment(rng, i)), 3),
    "same": _classes(lambda rng, i: " ; ".join(reasoning.paraphrase(rng, bool(i))), 2),
}


def block(rng: random.Random) -> str:
    """Three to eight examples of one rule in one template."""
    name = rng.choice(sorted(OPERATIONS)) if rng.random() < 0.55 else rng.choice(sorted(CLASSIFICATIONS))
    rule = OPERATIONS.get(name) or CLASSIFICATIONS[name]
    draw, template = rule(rng), rng.choice(_TEMPLATES)
    n = rng.randint(2, 5) if name in ("question", "follows", "same", "register") else rng.randint(3, 8)
    examples = [draw(rng) for _ in range(n)]
    return rng.choice(_JOINTS).join(template.format(x=x, y=y) for x, y in examples)
