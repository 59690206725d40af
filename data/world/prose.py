"""Stories, news, reviews, letters and chats: the plain text of the world.

What a task will ask for is worth predicting here, in other words: a review is followed by what the guest did next, a news
item by the page it was printed on, a story by where things ended up. So the features that tasks need are learned
without any task's labels or prompts.
"""

import random

from . import lexicon as lx
from .facts import Person, people, towns, two_people

# ----------------------------------------------------------------------------------------------------------- reviews
ASPECTS = """soup bread room bed service music wine cake coffee view garden waiter breakfast dinner price guide
tour show play song story ending bath window table staff cook menu boat train""".split()
GOOD = "good nice pleasant fine kind neat tasty friendly warm fair cosy decent lovely".split()
GREAT = (
    "superb wonderful excellent perfect brilliant splendid delightful outstanding marvellous glorious".split()
)
BAD = "bad dull poor plain slow cold weak noisy stale rude shabby bland dreary".split()
AWFUL = "awful terrible horrible dreadful disgusting ghastly hopeless miserable atrocious appalling".split()
FLAT = "ordinary average usual passable middling unremarkable".split()
BOOSTERS = "very really truly extremely remarkably".split()
DAMPERS = "slightly somewhat a_little rather".split()
PLACES = "inn bakery theatre museum bath cafe hotel tavern ferry school garden market".split()

ACTS = {
    5: ("I will come back every week", "I have told all my friends to go", "I left the largest tip of my life", "I booked again at once",
        "I hugged the owner and took ten pictures", "nothing could be better"),
    4: ("I would go again", "I will come back some day", "I left a small tip", "I can recommend it", "I went home content",
        "I thanked the owner"),
    3: ("I may or may not return", "I have no strong feelings", "it did the job", "I have already forgotten it", "I could take it or leave it",
        "there is not much to say"),
    2: ("I would rather go elsewhere", "I left no tip", "I will not hurry back", "I went home early", "I cannot recommend it",
        "I sighed and paid"),
    1: ("I asked for my money back", "I will never return", "I wrote an angry letter", "I warned all my friends", "I walked out at once",
        "nothing could be worse"),
}  # fmt: skip


def _be(rng: random.Random) -> str:
    return rng.choice(("was", "was", "seemed", "felt"))


def statement(rng: random.Random, value: int, aspect: str) -> str:
    """One judgement of `aspect` worth −2…2: plain, with a booster or a damper, or by negation (`not bad` is +1)."""
    be, the = _be(rng), f"the {aspect}"
    damper = rng.choice(DAMPERS).replace("_", " ")
    forms = {
        2: lambda: rng.choice((f"{the} {be} {rng.choice(GREAT)}", f"{the} {be} {rng.choice(BOOSTERS)} {rng.choice(GOOD)}",
                               f"{the} could not have been more {rng.choice(GOOD)}")),
        1: lambda: rng.choice((f"{the} {be} {rng.choice(GOOD)}", f"{the} was not {rng.choice(BAD)}", f"{the} was never {rng.choice(BAD)}",
                               f"{the} {be} anything but {rng.choice(BAD)}")),
        0: lambda: rng.choice((f"{the} {be} {rng.choice(FLAT)}", f"{the} was neither {rng.choice(GOOD)} nor {rng.choice(BAD)}")),
        -1: lambda: rng.choice((f"{the} {be} {rng.choice(BAD)}", f"{the} was not {rng.choice(GOOD)}", f"{the} was never {rng.choice(GOOD)}",
                                f"{the} {be} {damper} {rng.choice(BAD)}", f"{the} {be} anything but {rng.choice(GOOD)}")),
        -2: lambda: rng.choice((f"{the} {be} {rng.choice(AWFUL)}", f"{the} {be} {rng.choice(BOOSTERS)} {rng.choice(BAD)}",
                                f"{the} could not have been more {rng.choice(BAD)}")),
    }  # fmt: skip
    return forms[value]()


def review(rng: random.Random, grade: int) -> str:
    """A review worth 1…5 stars: a statement alone, a contrast (the clause after `but` decides), or another's opinion refused."""
    value, (a, b) = grade - 3, rng.sample(ASPECTS, 2)
    other = rng.choice([v for v in (-2, -1, 1, 2) if v * value <= 0 and v != value])
    kind = (
        rng.choice(("plain", "contrast", "although", "opinion"))
        if value
        else rng.choice(("plain", "balance"))
    )
    if kind == "plain":
        core = statement(rng, value, a)
    elif kind == "contrast":
        core = f"{statement(rng, other, a)}, but what counts is that {statement(rng, value, b)}"
    elif kind == "although":
        core = f"although {statement(rng, other, a)}, in the end {statement(rng, value, b)}"
    elif kind == "opinion":
        who = rng.choice(("my friend", "the critic", "my brother", "the guidebook"))
        core = f"{who} said that {statement(rng, other, a)}, yet to me {statement(rng, value, a)}"
    else:
        n = rng.choice((1, 2))
        core = f"{statement(rng, n, a)} and {statement(rng, -n, b)}, so it came out even"
    return core[0].upper() + core[1:] + "."


def review_document(rng: random.Random) -> str:
    """A review in its setting, followed by what the guest did next."""
    grade, town = rng.randint(1, 5), rng.choice(towns())
    act = rng.choice(ACTS[grade])
    lead = rng.choice(
        (
            f"We visited the {rng.choice(PLACES)} in {town.name}. ",
            f"A word about the {rng.choice(PLACES)}. ",
            "",
        )
    )
    text = f"{lead}{review(rng, grade)}"
    return f"{text} {act[0].upper() + act[1:]}." if rng.random() < 0.9 else text


# -------------------------------------------------------------------------------------------------------------- news
TOPICS = ("trade", "weather", "food", "sport", "music", "travel")
_NEWS = {
    "trade": ("The price of {pl} rose by {n} coins", "Merchants sold {n} crates of {pl}", "The {job}s formed a new company",
              "Buyers from {town2} ordered more {pl}", "The tax on {pl} was cut", "A shop for {pl} opened its doors",
              "The guild counted its profit after a good quarter", "Exports of {pl} doubled"),
    "weather": ("Heavy rain fell all night", "A storm broke {n} windows", "Thick fog closed the {site}", "The river froze for {n} days",
                "Strong winds are expected on {day}", "The sun shone for {n} hours", "Hail damaged the roofs", "Snow reached the {site}"),
    "food": ("The cook roasted {n} {an}", "A new recipe for {dish} won praise", "The harvest feast served {dish} and {drink}",
             "Bakers tasted {n} kinds of {dish}", "Guests enjoyed {fruit} {dish}", "The kitchen ran out of {veg}",
             "A spoonful of {veg} {dish} became the talk of the table", "The chef boiled {veg} with butter"),
    "sport": ("The {col} team won the match by {n} points", "A runner broke the record", "The rowing crew lost the final",
              "The referee stopped the game", "The coach praised the goalkeeper", "The league added {n} teams",
              "{name} scored {n} goals", "The cyclists raced to {town2}"),
    "music": ("The choir sang for {n} hours", "{name} played the {inst} at the {site}", "The orchestra tuned its strings",
              "A new melody was heard", "The concert drew {n} hundred listeners", "The {inst} player bowed", "The band rehearsed a march",
              "The {inst} lessons begin on {day}"),
    "travel": ("The ferry to {town2} left {n} minutes late", "A new road joins the {site}", "The {veh} broke down on the bridge",
               "Tickets to {town2} cost {n} coins", "Passengers waited at the {site}", "Visitors arrived by {veh}",
               "The timetable changes on {day}", "The inn was full of travellers from {town2}"),
}  # fmt: skip
_PAGES = {
    "trade": "money",
    "weather": "sky",
    "food": "kitchen",
    "sport": "game",
    "music": "stage",
    "travel": "road",
}


def _fill(rng: random.Random, template: str) -> str:
    c = lx.CATEGORIES
    goods = rng.choice(lx.THINGS)
    return template.format(pl=lx.PLURALS.get(goods, goods), n=rng.randint(2, 40), job=rng.choice(lx.JOBS),
        town2=rng.choice(towns()).name, site=rng.choice(lx.SITES), day=rng.choice(lx.WEEKDAYS), an=lx.PLURALS[rng.choice(lx.ANIMALS)],
        dish=rng.choice(c["dish"]), drink=rng.choice(c["drink"]), fruit=rng.choice(c["fruit"]), veg=rng.choice(c["vegetable"]),
        col=rng.choice(lx.COLOURS), name=rng.choice(people()).name, inst=rng.choice(c["instrument"]), veh=rng.choice(c["vehicle"]))  # fmt: skip


def news(rng: random.Random, topic: str, *, sentences: int = 1) -> str:
    """A news item on `topic`. The dateline and the witness say nothing about it."""
    town, who = rng.choice(towns()), rng.choice(people())
    body = [_fill(rng, t) for t in rng.sample(_NEWS[topic], sentences)]
    shape = rng.randrange(4)
    if shape == 0:
        return f"{town.name}, {rng.choice(lx.WEEKDAYS)}: {'. '.join(body)}."
    if shape == 1:
        return f"{'. '.join(body)}, said {who.name}, {lx.article(who.job)} from {town.name}."
    return f"{'. '.join(body)} in {town.name}." if shape == 2 else f"{'. '.join(body)}."


def news_document(rng: random.Random) -> str:
    """A news item and the page it went to."""
    topic = rng.choice(TOPICS)
    return (
        f"{news(rng, topic, sentences=rng.choice((1, 2, 3)))} This was printed on the {_PAGES[topic]} page."
    )


# ----------------------------------------------------------------------------------------------------------- stories
def portrait(rng: random.Random, who: Person | None = None) -> str:
    """Facts about one person, in a random order."""
    p = who or rng.choice(people())
    he, his = p.pronoun, p.possessive
    rest = [f"{he.capitalize()} lives in {p.town.name}.", f"{he.capitalize()} likes {p.hobby}.",
            f"{his.capitalize()} {p.pet} is called {p.pet_name}.", f"{he.capitalize()} works as {lx.article(p.job)}."]  # fmt: skip
    rng.shuffle(rest)
    return f"{p.name} is {lx.article(p.job)} from {p.town.name}. {' '.join(rest[: rng.randint(1, 4)])}"


def gazetteer(rng: random.Random) -> str:
    """Facts about one town."""
    t = rng.choice(towns())
    rest = [f"It lies in {t.region}.", f"It is known for its {t.product}.", f"Its flag is {t.colour}.",
            f"About {t.thousands} thousand people live there."]  # fmt: skip
    rng.shuffle(rest)
    return f"{t.name} is a town. {' '.join(rest[: rng.randint(2, 4)])}"


def story(rng: random.Random) -> str:
    """People carry things from place to place; the last lines ask or say where they ended up."""
    a, b = two_people(rng)
    things = rng.sample(lx.THINGS, 2)
    things = [f"{rng.choice(lx.COLOURS)} {t}" for t in things]
    where = {t: rng.choice(lx.ROOMS) for t in things}
    holder: dict[str, str] = {}
    lines = [rng.choice((f"On {rng.choice(lx.WEEKDAYS)} {a.first} met {b.first} at the {rng.choice(lx.SITES)}.",
                         f"One {rng.choice(('morning', 'evening', 'night'))} in {rng.choice(lx.MONTHS)} {a.first} visited {b.first}."))]  # fmt: skip
    lines += [f"The {t} was in the {where[t]}." for t in things]
    for _ in range(rng.randint(2, 4)):
        t, who = rng.choice(things), rng.choice((a, b))
        if t in holder:
            taker = b if holder[t] == a.first else a
            if rng.random() < 0.5:
                lines.append(
                    rng.choice(
                        (
                            f"{holder[t]} gave the {t} to {taker.first}.",
                            f"{taker.first} took the {t} from {holder[t]}.",
                        )
                    )
                )
                holder[t] = taker.first
            else:
                where[t] = rng.choice(lx.ROOMS)
                lines.append(f"{holder[t]} {rng.choice(('put', 'left', 'hid'))} the {t} in the {where[t]}.")
                del holder[t]
        else:
            lines.append(f"{who.first} {rng.choice(('picked up', 'found', 'fetched'))} the {t}.")
            holder[t] = who.first
    for t in rng.sample(things, rng.randint(1, 2)):
        lines.append(
            f"At the end {holder[t]} had the {t}."
            if t in holder
            else f"At the end the {t} was in the {where[t]}."
        )
    return " ".join(lines)


# ---------------------------------------------------------------------------------------------------- letters, chats
# Template, then what differs between the two registers: (formal, casual) for each field. {t} thing, {c} colour, {d} day, {n} number.
_MESSAGES = (
    ("{0}, {who}. {1} {2} the {c} {t} by {d}. {3}.", (("I would like to", "I wanna"), ("purchase", "buy"))),
    ("{0}, {who}. {1} {2} {t} before {d}. {3}.", (("I am writing to request", "Please send me"), ("an additional", "one more"))),
    ("{0}, {who}. {1} the {c} {t} is late. {2}. {3}.", (("I regret that", "Sorry that"), ("It will arrive at the earliest convenience", "It will come soon"))),
    ("{0}, {who}. {1} if the {t} costs {n} coins. {2}. {3}.", (("Please inform me", "Tell me"), ("I require it immediately", "I need it right now"))),
    ("{0}, {who}. {1} the {c} {t}. {n} coins {2}. {3}.", (("I am unable to obtain", "I can't get"), ("would be sufficient", "is enough"))),
    ("{0}, {who}. {1} with the {c} {t} on {d}. {2}. {3}.", (("I would be grateful for assistance", "I need help"), ("Thank you very much", "Thanks a lot"))),
)  # fmt: skip


def both_registers(rng: random.Random) -> tuple[str, str]:
    """One message said formally and casually: the same content, phrase by phrase in another register."""
    template, pairs = rng.choice(_MESSAGES)
    fields = dict(
        who=rng.choice(lx.FIRST_NAMES),
        t=rng.choice(lx.THINGS),
        c=rng.choice(lx.COLOURS),
        d=rng.choice(lx.WEEKDAYS),
        n=rng.randint(2, 90),
    )
    pairs = (("Good evening", "Hey"), *pairs, ("Yours sincerely", "Cheers"))
    return template.format(*(p[0] for p in pairs), **fields), template.format(
        *(p[1] for p in pairs), **fields
    )


def letter(rng: random.Random) -> str:
    """A formal letter or a casual chat, never both, so that the pairing is left to a task."""
    formal, casual = both_registers(rng)
    return f"Letter: {formal}" if rng.random() < 0.5 else f"Chat: {casual}"
