"""Few-shot blocks: several examples of one rule, which holds in that block only.

A rule may be an operation (last word, opposite, sorting, a sum), two operations called by names that the block makes up, or a
classification whose classes get fresh label words in every block. Nothing else names the rule, so the only way to predict an
answer is to infer it from the examples above it: this is what in-context learning grows from. Ledgers, read twice, come before
that: whoever can look a line up again has the circuit that the blocks need. Drills, a quarter and then half of what causal models
read, are blocks of what decides in a word, a clause or a sentence.
"""

import random
from collections.abc import Callable, Sequence

from . import lexicon as lx
from . import prose, reasoning
from .facts import people, towns

Rule = Callable[[random.Random], Callable[[random.Random], tuple[str, str]]]

MARK = "\ue000"  # stands around what can be inferred from the text before it; pretraining weighs it more and never reads the mark
_TEMPLATES = ("{x} -> {y}", "{x} => {y}", "Input: {x} Output: {y}", "x: {x} y: {y}", "{x} / {y}", "Text: {x}\nClass: {y}",
              "{x} = {y}", "Given {x} say {y}", "< {x} > {y}", "{x} | {y}", "Item: {x}\nResult: {y}", "[{x}] {y}")  # fmt: skip
_HEADED = (
    "{a}: {x}\n{b}: {y}",
    "{a}: {x} {b}: {y}",
    "{a} {x}\n{b} {y}",
    "{x}\n{b}: {y}",
)  # with two words of the block's own
_HEADS = [w.capitalize() for w in lx.THINGS + lx.JOBS + lx.ROOMS + lx.SITES + lx.HOBBIES]
_JOINTS = ("\n", "\n", " ; ", "\n\n", "\n\n")


def _words(rng: random.Random, low: int = 2, high: int = 5) -> list[str]:
    pool = rng.choice((lx.THINGS, lx.ANIMALS, lx.COLOURS, lx.THINGS + lx.ANIMALS, lx.LETTERS, lx.JOBS))
    return rng.sample(pool, rng.randint(low, high))


def _on_words(f: Callable[[list[str]], str], low: int = 2, high: int = 5) -> Rule:
    def rule(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        between = block.choice((" ", " ", ", "))
        return lambda rng: (between.join(w := _words(rng, low, high)), f(w))

    return rule


def _on_numbers(f: Callable[[list[int]], str], low: int, high: int, top: int = 100) -> Rule:
    def rule(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        between, below = block.choice((" ", ", ")), block.choice((top, min(top, 10)))

        def draw(rng: random.Random) -> tuple[str, str]:
            numbers = rng.sample(range(below), rng.randint(low, high))
            return between.join(map(str, numbers)), f(numbers).replace(" ", between)

        return draw

    return rule


def _mapping(pairs: list[tuple[str, str]]) -> Rule:
    return lambda _: lambda rng: rng.choice(pairs)


def _classes(
    make: Callable[[random.Random, int], str],
    n: int,
    words: Sequence[str] = lx.LABEL_WORDS,
    *,
    all_of_them: bool = False,
) -> Rule:
    """Classification with label words drawn anew for each block, of all classes or of two to four."""

    def rule(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
        keep = block.sample(range(n), n if all_of_them else min(n, block.choice((2, 2, 3, 4))))
        labels = block.sample(words, len(keep))

        def draw(rng: random.Random) -> tuple[str, str]:
            i = rng.randrange(len(keep))
            return make(rng, keep[i]), labels[i]

        return draw

    return rule


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choice(part) for part in (*lx.LABEL_PARTS[:2], *lx.LABEL_PARTS))


def _strange(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
    """Sentences of made-up words: the class is told by words that this block has used for it before."""
    labels = block.sample(lx.LABEL_WORDS, block.choice((2, 2, 3, 4)))
    own = [[_made_up(block) for _ in range(4)] for _ in labels]
    shared = [_made_up(block) for _ in range(4)]

    def draw(rng: random.Random) -> tuple[str, str]:
        i = rng.randrange(len(labels))
        words = rng.sample(own[i], rng.randint(1, 3)) + rng.sample(shared, rng.randint(0, 2))
        rng.shuffle(words)
        return " ".join(words), labels[i]

    return draw


def _mentions(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
    """Sentences on one of a few things: the thing decides."""
    labels = block.sample(lx.LABEL_WORDS, block.choice((2, 2, 3, 4)))
    things = block.sample(lx.THINGS, len(labels))

    def draw(rng: random.Random) -> tuple[str, str]:
        i = rng.randrange(len(labels))
        return reasoning.event_about(rng, things[i]), labels[i]

    return draw


def _called(block: random.Random) -> Callable[[random.Random], tuple[str, str]]:
    """Each line begins with words that call one of several operations; what they call is the block's own choice."""
    names = block.sample(
        sorted(set(OPERATIONS) - {"question", "count_in", "job", "town_product"}), block.choice((2, 2, 3, 4))
    )
    words = block.sample(_HEADS, 2 * len(names))
    calls = [" ".join(words[2 * i : 2 * i + block.choice((1, 2))]) for i in range(len(names))]
    draws = [OPERATIONS[name](block) for name in names]

    def draw(rng: random.Random) -> tuple[str, str]:
        i = rng.randrange(len(names))
        x, y = draws[i](rng)
        return f"{calls[i]} {x}", y

    return draw


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
# What an example of class i looks like, and how many classes there are.
_CLASSES: dict[str, tuple[Callable[[random.Random, int], str], int]] = {
    "topic": (lambda rng, i: prose.news(rng, prose.TOPICS[i]), len(prose.TOPICS)),
    "sentiment": (lambda rng, i: prose.review(rng, rng.choice(((1, 2), (4, 5))[i])), 2),
    "adjective": (lambda rng, i: rng.choice((prose.GOOD + prose.GREAT, prose.BAD + prose.AWFUL)[i]), 2),
    "kind": (_category, len(lx.CATEGORIES)),
    "register": (_sides, 2),
    "parity": (lambda rng, i: str(2 * rng.randint(0, 49) + i), 2),
    "pronoun": (lambda rng, i: rng.choice([p.first for p in people() if p.she == bool(i)][:99]), 2),
    "follows": (lambda rng, i: " ; ".join(reasoning.entailment(rng, i)), 3),
    "same": (lambda rng, i: " ; ".join(reasoning.paraphrase(rng, bool(i))), 2),
}
_OWN_LABELS: dict[str, Rule] = {"strange": _strange, "mentions": _mentions}
CLASSIFICATIONS: dict[str, Rule] = {name: _classes(*of) for name, of in _CLASSES.items()} | _OWN_LABELS


_LONG = (
    "question",
    "follows",
    "same",
    "register",
    "topic",
    "sentiment",
    "mentions",
)  # their examples fill a line or more


def _rule(rng: random.Random) -> tuple[str, Rule]:
    kind = rng.random()
    if kind < 0.2:
        return "called", _called
    if kind < 0.26:
        return "question", OPERATIONS["question"]
    name = rng.choice(sorted(OPERATIONS)) if kind < 0.48 else rng.choice(sorted(CLASSIFICATIONS))
    return name, OPERATIONS.get(name) or CLASSIFICATIONS[name]


def block(rng: random.Random) -> str:
    """Six to twenty examples of one rule in one template (long ones: four to ten); from the third on, answers are marked."""
    name, rule = _rule(rng)
    draw = rule(rng)
    template = rng.choice(_TEMPLATES) if rng.random() < 0.3 else rng.choice(_HEADED)
    a, b = rng.sample(_HEADS, 2)
    n = rng.randint(4, 10) if name in _LONG else rng.randint(6, 20)
    examples = [draw(rng) for _ in range(n)]
    told = [(x, y if i < 2 else f"{MARK}{y}{MARK}") for i, (x, y) in enumerate(examples)]
    return rng.choice(_JOINTS).join(template.format(x=x, y=y, a=a, b=b) for x, y in told)


_WORDS = sorted({*lx.COLOURS, *lx.NUMBERS, *lx.THINGS, *lx.JOBS, *lx.SITES, *lx.ROOMS, *lx.ANIMALS, *lx.HOBBIES, *prose.TOPICS,
                 *prose.GOOD, *prose.BAD, *prose.GREAT, *prose.AWFUL, *lx.WEEKDAYS, *"yes no maybe same different home true false".split()})  # fmt: skip
_ANY_HEADS = [w.capitalize() for w in _WORDS + lx.LABEL_WORDS]
_JUDGED = ((-2, -1), (1, 2))
_LABELLED: dict[str, Rule] = {name: _classes(*of, _WORDS) for name, of in _CLASSES.items()} | _OWN_LABELS | {
    "statement": _classes(lambda rng, i: prose.statement(rng, rng.choice(_JUDGED[i]), rng.choice(prose.ASPECTS)), 2, _WORDS),
    "stars": _classes(lambda rng, i: prose.review(rng, i + 1), 5, _WORDS, all_of_them=True),
}  # fmt: skip
_DRILLS: dict[str, Rule] = OPERATIONS | {"called": _called} | _LABELLED
# How often each comes in a drill: what decides is first a word, then a clause, then a sentence.
_SHARES = {"adjective": 2, "statement": 3, "sentiment": 3, "stars": 1.5, "topic": 4, "kind": 2, "register": 0.7, "follows": 1, "same": 0.5,
           "mentions": 2, "strange": 3, "called": 3, "question": 2, "sort_numbers": 1, "count": 1, "last": 1}  # fmt: skip


def drill(rng: random.Random, name: str | None = None) -> str:
    """Five to sixteen examples of one rule, mostly a classification, between head words of the block's own.

    A label is marked from its second time on: before that, nothing tells it. Whoever reads mostly these learns to compare a new
    sentence with those above and to copy the label of the most similar one.
    """
    name = name or rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    draw = _DRILLS[name](rng)
    template = rng.choice(_TEMPLATES if rng.random() < 0.15 else (_HEADED[0], *_HEADED))
    a, b = rng.sample(_ANY_HEADS, 2)
    examples = [
        draw(rng) for _ in range(rng.randint(5, 11) if name in (*_LONG, "stars") else rng.randint(6, 16))
    ]
    told, seen = [], set()
    for i, (x, y) in enumerate(examples):
        inferable = y in seen if name in _LABELLED else i >= 2
        seen.add(y)
        told.append(template.format(x=x, y=f"{MARK}{y}{MARK}" if inferable else y, a=a, b=b))
    return rng.choice(_JOINTS).join(told)


def ledger(rng: random.Random) -> str:
    """Who holds which ticket, in arbitrary pairs, read twice: the second time in the same order or in another."""
    n = rng.randint(4, 10)
    names = (
        rng.sample(lx.TOWNS, n)
        if rng.random() < 0.4
        else [f"{rng.choice(lx.FIRST_NAMES)} {s}" for s in rng.sample(lx.SURNAMES, n)]
    )
    values = [
        rng.choice(
            (
                f"{rng.choice(lx.COLOURS)} {rng.choice(lx.THINGS)}",
                rng.choice(lx.LABEL_WORDS),
                str(rng.randint(10, 99)),
            )
        )
        for _ in names
    ]
    between, joint = rng.choice((": ", " has ", " - ", " = ", " ")), rng.choice(("\n", ", ", "; "))
    order = range(n) if rng.random() < 0.3 else rng.sample(range(n), n)
    first = joint.join(f"{names[i]}{between}{values[i]}" for i in range(n))
    again = joint.join(f"{names[i]}{between}{MARK}{values[i]}{MARK}" for i in order)
    return f"{rng.choice(('Ledger', 'Tickets', 'Guests', 'Parcels'))}\n{first}\n{rng.choice(('Once more', 'Again', 'Read back'))}\n{again}"
