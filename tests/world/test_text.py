"""The generator: seeded, varied, consistent with its own facts, and silent about what is held out."""

import random
import re
from collections import Counter

import pytest
from world import corpus, domains, facts, prose, reasoning, rules, tasks, velan
from world import lexicon as lx


def _text(n: int = 4000, seed: int = 3) -> str:
    return "\n".join(corpus.documents(seed, n))


def test_the_seed_fixes_the_text():
    assert list(corpus.documents(8, 60)) == list(corpus.documents(8, 60))
    assert list(corpus.documents(8, 60)) != list(corpus.documents(9, 60))


def test_the_vocabulary_is_rich_and_documents_hardly_repeat():
    documents = list(corpus.documents(3, 8000))
    words = set(re.findall(r"[A-Za-z]+", " ".join(documents)))
    assert len(words) > 4000
    assert len(set(documents)) > 0.97 * len(documents)


@pytest.mark.parametrize("make", [domains.bank_text, domains.clinic_text, velan.text])
def test_held_out_domains_bring_words_that_pretraining_never_reads(make):
    read = set(re.findall(r"[a-z]{5,}", _text()))
    rng = random.Random(0)
    held_out = Counter(re.findall(r"\b[a-z]{5,}\b", " ".join(make(rng) for _ in range(200))))
    new = sum(n for word, n in held_out.items() if word not in read)
    assert new > 0.5 * held_out.total()


def test_no_prompt_of_a_task_occurs_in_pretraining():
    text = _text()
    for task in tasks.ALL:
        row = task.draw(random.Random(1), "train")
        if prompt := str(row.get("prompt", "")):
            assert prompt.rstrip().split("\n")[-1] not in text, task.name


def test_a_person_is_the_same_in_every_document():
    jobs: dict[str, set[str]] = {}
    for document in corpus.documents(4, 6000):
        for name, job in re.findall(r"^(\w+ \w+) is an? (\w+) from", document):
            jobs.setdefault(name, set()).add(job)
    known = {p.name: {p.job} for p in facts.people()}
    assert len(jobs) > 100
    assert all(known[name] == found for name, found in jobs.items())


def _replay(story: str) -> dict[str, str]:
    """Where each thing is after the events of a story, read from its sentences alone."""
    place: dict[str, str] = {}
    for line in story.split("."):
        if line.strip().startswith("At the end"):
            break
        if found := re.search(r"The (\w+ \w+) was in the (\w+)$", line):
            place[found[1]] = found[2]
        elif found := re.search(r"(\w+) (?:picked up|found|fetched) the (\w+ \w+)$", line):
            place[found[2]] = found[1]
        elif found := re.search(r"gave the (\w+ \w+) to (\w+)$", line):
            place[found[1]] = found[2]
        elif found := re.search(r"(\w+) took the (\w+ \w+) from", line):
            place[found[2]] = found[1]
        elif found := re.search(r"(?:put|left|hid) the (\w+ \w+) in the (\w+)$", line):
            place[found[1]] = found[2]
    return place


def test_stories_end_as_their_events_say():
    rng = random.Random(5)
    endings = 0
    for _ in range(300):
        text = prose.story(rng)
        place = _replay(text)
        for thing, where in re.findall(r"At the end the (\w+ \w+) was in the (\w+)\.", text):
            assert place[thing] == where, text
            endings += 1
        for who, thing in re.findall(r"At the end (\w+) had the (\w+ \w+)\.", text):
            assert place[thing] == who, text
            endings += 1
    assert endings > 300


def _polarity(clause: str) -> int:
    """−1, 0 or 1 for one clause, by a reading that doesn't use the generator: adjectives and what turns them round."""
    words = re.findall(r"\w+", clause)
    good = any(w in prose.GOOD + prose.GREAT for w in words)
    bad = any(w in prose.BAD + prose.AWFUL for w in words)
    if (good and bad) or not (good or bad):
        return 0
    turned = (
        any(w in ("not", "never", "anything") for w in words) and "could not have been more" not in clause
    )
    return (1 if good else -1) * (-1 if turned else 1)


def test_reviews_mean_their_grade():
    rng = random.Random(6)
    for _ in range(500):
        grade = rng.choice((1, 2, 4, 5))
        text = prose.review(rng, grade)
        last = re.split(r"but what counts is that|in the end|yet to me", text)[-1]
        assert _polarity(last) == (1 if grade > 3 else -1), text


def test_no_single_word_gives_a_review_away():
    """Negation and contrast put good words into bad reviews: a bag of words must not be enough."""
    rng = random.Random(7)
    bad = [prose.review(rng, rng.choice((1, 2))) for _ in range(600)]
    with_good_word = sum(any(w in prose.GOOD + prose.GREAT for w in re.findall(r"\w+", t)) for t in bad)
    assert with_good_word > 0.4 * len(bad)


def test_paraphrases_tell_one_event_and_the_others_differ():
    rng = random.Random(8)

    def roles(sentence: str) -> tuple[str, ...]:
        found = re.search(r"at the (\w+) (\w+) was \w+ an? (\w+) (\w+) by (\w+)", sentence)
        if found:
            site, taker, adjective, noun, giver = found.groups()
        elif found := re.search(r"(\w+) got an? (\w+) (\w+) from (\w+) at the (\w+)", sentence):
            taker, adjective, noun, giver, site = found.groups()
        elif found := re.search(r"(\w+) \w+ an? (\w+) (\w+) to (\w+) at the (\w+)", sentence):
            giver, adjective, noun, taker, site = found.groups()
        else:
            found = re.search(r"(\w+) \w+ (\w+) an? (\w+) (\w+) at the (\w+)", sentence)
            assert found, sentence
            giver, taker, adjective, noun, site = found.groups()
        return giver, taker, adjective, noun, site

    for i in range(300):
        first, second = reasoning.paraphrase(rng, bool(i % 2))
        assert (roles(first) == roles(second)) == bool(i % 2), (first, second)
        first, second = map(roles, reasoning.paraphrase(rng, False, strict=True))
        assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, False, False]


def test_no_material_gives_a_paraphrase_away():
    """The other event's adjective is drawn from all of them: from the colours alone, a material would mean `same`."""
    rng = random.Random(9)
    share = {}
    for same in (False, True):
        seconds = [reasoning.paraphrase(rng, same, strict=True)[1] for _ in range(1000)]
        share[same] = sum(not set(lx.MATERIALS).isdisjoint(text.split()) for text in seconds) / 1000
    assert abs(share[True] - share[False]) < 0.08


def test_questions_are_answered_in_the_passage():
    rng = random.Random(9)
    for _ in range(200):
        passage, _, answer = reasoning.passage_question(rng)
        assert answer in passage


def test_few_shot_blocks_follow_one_rule_with_label_words_of_their_own():
    rng = random.Random(10)
    draw = rules.CLASSIFICATIONS["parity"](rng)
    pairs = {(int(x) % 2, y) for x, y in (draw(rng) for _ in range(60))}
    assert len(pairs) == 2
    assert len({y for _, y in pairs}) == 2
    labels = {y for _ in range(40) for _, y in [rules.CLASSIFICATIONS["parity"](rng)(rng)]}
    assert len(labels) > 20
    for name, expected in {"sort": sorted, "last": lambda words: words[-1:]}.items():
        draw = rules.OPERATIONS[name](rng)
        pairs = [draw(rng) for _ in range(50)]
        assert all(expected(x.replace(",", "").split()) == y.split() for x, y in pairs)


def test_a_block_that_calls_operations_by_name_keeps_to_a_few():
    rng = random.Random(14)
    names = set()
    for _ in range(30):
        draw = rules._called(rng)
        called = {x.split()[0] for x, _ in (draw(rng) for _ in range(60))}
        assert 2 <= len(called) <= 8
        names |= called
    assert len(names) > 20  # other names in every block


def test_a_ledger_reads_back_what_it_said():
    rng = random.Random(15)
    orders = set()
    for _ in range(100):
        text = rules.ledger(rng)
        told = re.findall(f"{rules.MARK}(.*?){rules.MARK}", text)
        _, first, _, again = re.split(
            r"^(?:Ledger|Tickets|Guests|Parcels)\n|\n(Once more|Again|Read back)\n", text
        )[-4:]
        lines, repeated = (re.split(r"\n|, |; ", part.replace(rules.MARK, "")) for part in (first, again))
        assert sorted(lines) == sorted(repeated)
        assert all(line.endswith(value) for line, value in zip(repeated, told, strict=True))
        orders.add(lines == repeated)
    assert orders == {True, False}


def test_velan_tags_follow_from_endings_and_words_from_its_own_sounds():
    rng = random.Random(11)
    english = set(re.findall(r"[a-z]+", _text(1500).lower()))
    for _ in range(200):
        words, tags = velan.sentence(rng, rng.choice(velan.TOPICS))
        assert not set(words) & english
        for word, tag in zip(words, tags, strict=True):
            if tag.startswith("VERB"):
                assert word.endswith("esh" if tag == "VERB-PAST" else "orr")
            elif tag in ("SUBJECT", "OBJECT"):
                assert word.endswith("ik" if tag == "SUBJECT" else "un")


def test_every_bank_query_runs_and_most_find_something():
    rng = random.Random(12)
    script = domains.bank_script(random.Random(2000))
    found = [domains.bank_rows_of(domains.bank_question(rng)[1], script) for _ in range(150)]
    assert sum(bool(rows) and rows != [(None,)] for rows in found) > 0.9 * len(found)


def test_the_lexicon_has_a_plural_for_all_things():
    assert all(t in lx.PLURALS for t in lx.THINGS + lx.ANIMALS)


def test_a_drill_marks_a_label_once_an_example_above_has_told_it():
    labelled = 0
    for seed in range(300):
        rng = random.Random(seed)
        text = rules.drill(rng, rng.choice(sorted(rules._LABELLED)))
        parts = text.split(rules.MARK)
        for i in range(1, len(parts), 2):
            assert re.search(rf"(?<!\w){re.escape(parts[i])}(?!\w)", "".join(parts[:i])), text
            labelled += 1
    assert labelled > 1000


def test_a_drill_draws_labels_and_heads_anew_and_uses_no_prompt_of_a_task():
    drills = [rules.drill(random.Random(seed), "sentiment").replace(rules.MARK, "") for seed in range(300)]
    first = Counter(re.split(r"\W", text)[0] for text in drills)
    assert len(first) > 100
    prompts = [str(t.draw(random.Random(1), "train").get("prompt", "")) for t in tasks.ALL]
    heads = {prompt.rstrip().split("\n")[-1] for prompt in prompts} - {""}
    assert not [head for head in heads if any(head in text for text in drills)]
