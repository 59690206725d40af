"""Text that rewards reading closely: questions on a passage, what follows from what, lists, sums, tables, SQL."""

import random
from dataclasses import dataclass, replace

from . import lexicon as lx
from .facts import people, towns, two_people

# ------------------------------------------------------------------------------------------------------------ events
_VERBS = (
    ("gave", "was given"),
    ("sold", "was sold"),
    ("sent", "was sent"),
    ("lent", "was lent"),
    ("showed", "was shown"),
)
_ADJECTIVES = lx.COLOURS + lx.MATERIALS
_TRANSFERS = (*_VERBS[:4], ("handed", "was handed"))  # what is shown is not had: the tasks leave it out


@dataclass(frozen=True)
class Event:
    """Somebody gives something to somebody somewhere: the atom of entailment, paraphrase and questions."""

    giver: str
    taker: str
    adjective: str
    noun: str
    verb: str
    passive: str
    site: str

    def active(self) -> str:
        return f"{self.giver} {self.verb} {self.taker} {lx.article(self.adjective)} {self.noun} at the {self.site}"

    def active_to(self) -> str:
        return f"{self.giver} {self.verb} {lx.article(self.adjective)} {self.noun} to {self.taker} at the {self.site}"

    def passive_form(self) -> str:
        return f"at the {self.site} {self.taker} {self.passive} {lx.article(self.adjective)} {self.noun} by {self.giver}"

    def received(self) -> str:
        return (
            f"{self.taker} got {lx.article(self.adjective)} {self.noun} from {self.giver} at the {self.site}"
        )


def event(rng: random.Random, verbs: tuple[tuple[str, str], ...] = _VERBS) -> Event:
    a, b = two_people(rng)
    verb, passive = rng.choice(verbs)
    return Event(
        a.first,
        b.first,
        rng.choice(_ADJECTIVES),
        rng.choice(lx.THINGS),
        verb,
        passive,
        rng.choice(lx.SITES),
    )


def _say(rng: random.Random, e: Event) -> str:
    return rng.choice((e.active, e.active_to, e.passive_form, e.received))()


def event_about(rng: random.Random, noun: str) -> str:
    """Somebody gives this thing to somebody, in one of four forms."""
    return _say(rng, replace(event(rng), noun=noun))


def _swap(e: Event) -> Event:
    return Event(e.taker, e.giver, e.adjective, e.noun, e.verb, e.passive, e.site)


def _vary(rng: random.Random, e: Event) -> Event:
    """The event with one detail that makes it another event: people swapped, colour, thing or place changed."""
    which = rng.randrange(4)
    return _swap(e) if which == 0 else _change(rng, e, ("adjective", "noun", "site")[which - 1])


def _change(rng: random.Random, e: Event, *details: str, adjectives: list[str] = lx.COLOURS) -> Event:
    """The event with another colour, thing or place. Of the adjectives all must be drawn, or a material tells the class."""
    words = {"adjective": adjectives, "noun": lx.THINGS, "site": lx.SITES}
    return replace(e, **{d: rng.choice([w for w in words[d] if w != getattr(e, d)]) for d in details})


def paraphrase(rng: random.Random, same: bool, *, strict: bool = False) -> tuple[str, str]:
    """Two sentences on one event (`same`) or on two: those differ in a single detail, or, if `strict`, in thing, colour and place.

    A thing alone that differs is more than nano finds in a thousand examples: 51 % after eight epochs.
    """
    e = event(rng, _TRANSFERS if strict else _VERBS)
    first = _say(rng, e)
    if not same:
        e = _change(rng, e, "adjective", "noun", "site", adjectives=_ADJECTIVES) if strict else _vary(rng, e)
    return first, _say(rng, e)


def entailment(rng: random.Random, label: int, *, strict: bool = False) -> tuple[str, str]:
    """Premise and hypothesis: 0 it follows, 1 it may be, 2 it contradicts; `strict`: things change hands for certain."""
    e = event(rng, _TRANSFERS if strict else _VERBS)
    premise = _say(rng, e)
    category = lx.CATEGORY_OF.get(e.noun, "thing")
    if label == 0:
        said = rng.choice((f"{e.taker} got {lx.article(e.noun)}", f"{e.giver} met {e.taker} at the {e.site}", f"{e.giver} no longer has the {e.noun}",
                           f"{e.taker} received {lx.article(category)}", f"the {e.noun} was {e.adjective}", f"{e.giver} was at the {e.site}"))  # fmt: skip
    elif label == 1:
        said = rng.choice((f"{e.taker} had asked for the {e.noun}", f"{e.giver} bought the {e.noun} on {rng.choice(lx.WEEKDAYS)}",
                           f"the {e.noun} was {rng.choice(('new', 'old', 'cheap', 'heavy'))}", f"{e.taker} likes {rng.choice(lx.HOBBIES)}",
                           f"{e.giver} and {e.taker} are old friends", f"the {e.site} was crowded"))  # fmt: skip
    else:
        site = rng.choice([s for s in lx.SITES if s != e.site])
        colour = rng.choice([c for c in lx.COLOURS if c != e.adjective])
        said = rng.choice((f"{e.giver} got {lx.article(e.noun)}", f"{e.giver} met {e.taker} at the {site}", f"{e.giver} still has the {e.noun}",
                           f"{e.taker} got nothing", f"the {e.noun} was {colour}", f"{e.taker} {e.verb} {e.giver} {lx.article(e.noun)}"))  # fmt: skip
    return premise, said


def consequence(rng: random.Random) -> str:
    """Discourse that turns on what follows: `So …`, `Perhaps …`, `It is wrong that …`, `In other words …`."""
    if rng.random() < 0.5:
        first, second = paraphrase(rng, same := rng.random() < 0.5)
        joint = "In other words" if same else "On another day"
        return f"{_cap(first)}. {joint}, {second}."
    label = rng.randrange(3)
    premise, said = entailment(rng, label)
    return f"{_cap(premise)}. {('So', 'Perhaps', 'It is wrong that')[label]} {said}."


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


# --------------------------------------------------------------------------------------------------------- questions
def passage_question(rng: random.Random, *, strict: bool = False) -> tuple[str, str, str]:
    """A passage of two events, a question on one of them, and the answer, a word or two of the passage."""
    verbs = _TRANSFERS if strict else _VERBS
    e, f = event(rng, verbs), event(rng, verbs)
    while {e.giver, e.taker} & {f.giver, f.taker} or e.noun == f.noun or e.site == f.site:
        f = event(rng, verbs)
    passage = f"{_cap(_say(rng, e))}. {_cap(_say(rng, f))}."
    e = rng.choice((e, f))
    question, answer = rng.choice((
        (f"who got the {e.noun}", e.taker), (f"who {e.verb} the {e.noun}", e.giver), (f"what did {e.taker} get", f"{e.adjective} {e.noun}"),
        (f"where was the {e.noun}", e.site), (f"where was {e.giver}", e.site), (f"how was the {e.noun}", e.adjective)))  # fmt: skip
    return passage, question, answer


def question_document(rng: random.Random) -> str:
    if rng.random() < 0.3:
        p = rng.choice(people())
        question, answer = rng.choice(((f"Where does {p.name} live", p.town.name), (f"What is the job of {p.name}", p.job),
                                       (f"What does {p.name} like", p.hobby), (f"What is the {p.pet} of {p.name} called", p.pet_name)))  # fmt: skip
        return f"Q: {question}? A: {answer}."
    passage, question, answer = passage_question(rng)
    return f"{passage} Q: {_cap(question)}? A: {answer}."


# ------------------------------------------------------------------------------------------------------ lists, tables
def list_document(rng: random.Random) -> str:
    """Sums, sorted lists, counts."""
    kind = rng.randrange(5)
    if kind == 0:
        a, b = rng.randint(0, 50), rng.randint(0, 49)
        return f"{a} + {b} = {a + b}. {a + b} - {b} = {a}."
    if kind == 1:
        xs = rng.sample(range(0, 100), rng.randint(3, 6))
        return f"The numbers {lx.join_words([str(x) for x in xs])} in order are {lx.join_words([str(x) for x in sorted(xs)])}. The largest is {max(xs)}."
    if kind == 2:
        xs = rng.sample(lx.THINGS + lx.ANIMALS, rng.randint(3, 5))
        return f"{_cap(lx.join_words(xs))}: in order {lx.join_words(sorted(xs))}. The first is {min(xs)}."
    if kind == 3:
        words = rng.sample(lx.THINGS, 2)
        xs = [rng.choice(words) for _ in range(rng.randint(3, 7))]
        return f"{' '.join(xs)}: that is {lx.NUMBERS[xs.count(words[0])]} times {words[0]} and {lx.NUMBERS[xs.count(words[1])]} times {words[1]}."
    word = rng.choice(list(lx.CATEGORY_OF))
    return f"{_cap(lx.article(word))} is {lx.article(lx.CATEGORY_OF[word])}."


def table_document(rng: random.Random) -> str:
    """A row of a table, then a sentence that reads it."""
    p = rng.choice(people())
    pay, age = rng.randint(10, 90), rng.randint(18, 80)
    row = [f"name: {p.name}", f"job: {p.job}", f"town: {p.town.name}", f"age: {age}", f"pay: {pay}"]
    rng.shuffle(row)
    old = "old" if age > 60 else "young" if age < 30 else "of middle age"
    ending = rng.choice((f"{p.first} is {age} years old and {old}", f"{p.first} earns {pay} coins, {'much' if pay > 60 else 'little' if pay < 30 else 'enough'}",
                         f"{p.first} lives in {p.town.name}", f"{p.first} is {lx.article(p.job)}"))  # fmt: skip
    return f"{' | '.join(row)}. {ending}."


# --------------------------------------------------------------------------------------------------------------- SQL
_SHOP = {"sales": ("item", "town", "price", "amount"), "staff": ("name", "job", "town", "pay")}


def sql_document(rng: random.Random) -> str:
    """A question on the shop's two tables and the SQL that answers it (the bank's tables are held out)."""
    if rng.random() < 0.5:
        table, what, text, number = "sales", rng.choice(lx.THINGS), ("item", "town"), ("price", "amount")
    else:
        table, what, text, number = "staff", rng.choice(lx.JOBS), ("job", "town"), ("pay",)
    town, n, num = rng.choice(towns()).name, rng.randint(2, 90), rng.choice(number)
    col, value = rng.choice(((text[0], what), (text[1], town)))
    key = _SHOP[table][0]
    question, sql = rng.choice((
        (f"How many {table} have {col} {value}", f"SELECT COUNT(*) FROM {table} WHERE {col} = '{value}'"),
        (f"Show the {key} of {table} with {num} above {n}", f"SELECT {key} FROM {table} WHERE {num} > {n}"),
        (f"What is the highest {num} in {table} with {col} {value}", f"SELECT MAX({num}) FROM {table} WHERE {col} = '{value}'"),
        (f"What is the average {num} of {table} by {text[1]}", f"SELECT {text[1]}, AVG({num}) FROM {table} GROUP BY {text[1]}"),
        (f"Show the {key} of {table} with {col} {value} and {num} below {n}", f"SELECT {key} FROM {table} WHERE {col} = '{value}' AND {num} < {n}"),
        (f"Show the {key} of {table} from the largest {num}", f"SELECT {key} FROM {table} ORDER BY {num} DESC")))  # fmt: skip
    return f"{question}? SQL: {sql};"
