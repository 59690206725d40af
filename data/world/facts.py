"""The facts of the little world: drawn once from a fixed seed, the same in every document.

A model can learn them (Elsa Foxley is a baker in Kelport), a task can ask for them, and an edit can contradict them.
"""

import random
from dataclasses import dataclass
from functools import cache

from . import lexicon as lx

WORLD_SEED = 20261122


@dataclass(frozen=True)
class Town:
    """A town: where it lies, what it makes, what its flag shows, and how many people live there (thousands)."""

    name: str
    region: str
    product: str
    colour: str
    thousands: int


@dataclass(frozen=True)
class Person:
    """A person: job, home town, hobby, pet and its name; `she` says which pronouns the texts use."""

    first: str
    last: str
    she: bool
    job: str
    town: Town
    hobby: str
    pet: str
    pet_name: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def pronoun(self) -> str:
        return "she" if self.she else "he"

    @property
    def possessive(self) -> str:
        return "her" if self.she else "his"


@cache
def towns() -> tuple[Town, ...]:
    """The 240 towns."""
    rng = random.Random(WORLD_SEED)
    products = [lx.PLURALS[w] for w in lx.THINGS if w in lx.PLURALS]
    return tuple(
        Town(n, rng.choice(lx.REGIONS), rng.choice(products), rng.choice(lx.COLOURS), rng.randint(2, 99))
        for n in rng.sample(lx.TOWNS, 240)
    )


@cache
def people() -> tuple[Person, ...]:
    """The 900 people. A first name always goes with the same pronoun."""
    rng = random.Random(WORLD_SEED + 1)
    she = {n: (n[-1] in "aeyhs" and n not in ("Arne", "Basil", "Boris", "Clive", "Amos", "Enzo", "Gus", "Hans", "Jonas",
           "Lars", "Linus", "Louis", "Lucas", "Luis", "Nils", "Tobias", "Ralph")) or n in ("Edith", "Ethel", "Iris", "Mabel",
           "Joan", "Harriet", "Doris") for n in lx.FIRST_NAMES}  # fmt: skip
    found: dict[str, Person] = {}
    while len(found) < 900:
        first, last = rng.choice(lx.FIRST_NAMES), rng.choice(lx.SURNAMES)
        person = Person(first, last, she[first], rng.choice(lx.JOBS), rng.choice(towns()), rng.choice(lx.HOBBIES),
                        rng.choice(lx.ANIMALS), rng.choice(lx.FIRST_NAMES))  # fmt: skip
        found.setdefault(person.name, person)
    return tuple(found.values())


def two_people(rng: random.Random) -> tuple[Person, Person]:
    """Two people with different first names."""
    while True:
        a, b = rng.sample(people(), 2)
        if a.first != b.first:
            return a, b
