"""``python -m experiments.story_items.make``: write the built-in items, toolkit/evaluation/sets/*.jsonl.

The items are made from stories of the seed -1. ``SyntheticStories.corpus_seed`` can't be negative, so no run trains on
these stories. Short sentences can be the same in two stories: an item that has no sentence of its own, not in the
default stories of SyntheticStories, is left out. The result depends on nothing but the tables of components/stories.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from components import stories
from components.stories import NODES, Node, grow, story, tell
from toolkit.evaluation.builtin import FOLDER
from toolkit.store.disk import write_bytes

SEED = -1
TRAINED_ON = range(20_500)  # the stories of the default SyntheticStories, training and validation
PAIRS = 150  # items with a plural subject, and as many with a singular one
FORMS = {"he": 40, "his": 60, "him": 30}  # items of girls with each pronoun, and as many of boys
OF_A_FACT, STORIES, OPENINGS = 50, 80, 60
LONGEST = {"agreement": 110, "pronouns": 150, "coherence": 330}  # characters
PEOPLE = {name: "girl" for name in stories.GIRLS} | {name: "boy" for name in stories.BOYS}
NAMES = {*PEOPLE, *stories.PETS}
GENDERS = {"girl", "boy", "sister", "brother"}
VERBS = {"was": "were", "were": "was"}
SENTENCE_END = re.compile(r'(?<=[.!?"])\s+')
Row = dict[str, object]


def agreement() -> Iterator[Row]:
    """Minimal pairs: sentences of stories in which "was" and "were" are exchanged. Half of the subjects are plural."""
    counts, seen = dict.fromkeys(VERBS, 0), set[tuple[str, str]]()
    for sentence in _sentences(range(10_000)):
        verbs = re.findall(r"\b(was|were)\b", sentence)
        if len(verbs) != 1 or '"' in sentence or not 5 <= len(sentence.split()) or not _is_new(sentence):
            continue
        before, verb, after = sentence.partition(f" {verbs[0]} ")
        around = (_kind_of_word(before.split()[-1]), _kind_of_word(after.split()[0] if after else ""))
        if not after or len(sentence) > LONGEST["agreement"] or around in seen or counts[verbs[0]] == PAIRS:
            continue
        seen.add(around)
        counts[verbs[0]] += 1
        yield {"sentence_good": sentence, "sentence_bad": f"{before} {VERBS[verbs[0]]} {after}"}
        if set(counts.values()) == {PAIRS}:
            return


def attractors() -> Iterator[Row]:
    """Minimal pairs as in ``agreement``, with another noun between the subject and its verb: "The merry pigeons near
    the old mill were proud." In half of them it has the other number, so that nothing can be known from it. They are
    joined from words and phrases that stories use apart from each other."""
    rng, counts = random.Random(SEED), dict.fromkeys(itertools.product(VERBS, (True, False)), 0)
    sights = re.findall(r"<some> \[([^\]]+)\] were", stories.PLACES)
    subjects = {
        "was": _leaves(NODES["helpword"]),
        "were": sorted({noun for each in sights for noun in each.split("|")}),
    }
    made: set[str] = set()
    while len(made) < 2 * PAIRS:
        verb, mood = stories.choose([*VERBS], rng), grow([NODES["happy"], NODES["blue2"]], rng)
        subject = f"The {grow(NODES['helptrait'], rng)} {stories.choose(subjects[verb], rng)}"
        place = f"{grow(NODES['near'], rng)} {grow(NODES['past'], rng)}"
        group = verb, place.endswith(("trees", "rows"))
        good, bad = (f"{subject} {place} {each} {mood}." for each in (verb, VERBS[verb]))
        if good not in made and counts[group] < PAIRS // 2 and _is_new(good):
            made.add(good)
            counts[group] += 1
            yield {"sentence_good": good, "sentence_bad": bad}


def pronouns() -> Iterator[Row]:
    """Minimal pairs: passages that name one person, with one pronoun for this person after the name. In the bad
    passage it is that of the other gender. She is right as often as he, and her as often as his and him."""
    counts, seen = {(gender, form): 0 for gender in ("girl", "boy") for form in FORMS}, set[tuple[str, ...]]()
    for index in range(10_000, 20_000):
        sentences, exchanged = _split(story(SEED, index)), _split(_with_exchanged_pronouns(index))
        for start, length in itertools.product(range(len(sentences)), (3, 2, 1)):
            good, bad = (" ".join(each[start : start + length]) for each in (sentences, exchanged))
            if good == bad or len(good) > LONGEST["pronouns"]:
                continue
            group, opening = _group(good, bad), tuple(map(_kind_of_word, _words(sentences[start])[:6]))
            if group is None or opening in seen or counts[group] == FORMS[group[1]]:
                continue
            if any(map(_is_new, sentences[start : start + length])):
                seen.add(opening)
                counts[group] += 1
                yield {"sentence_good": good, "sentence_bad": bad}
                break
        if all(count == FORMS[form] for (_, form), count in counts.items()):
            return


def coherence() -> Iterator[Row]:
    """Passages that end before a word that was said in them: who, what, which colour, which helper, where it is kept.
    The other three choices are words of the same bank that the passage does not have; of names, one is that of the
    other character. ``text`` has the right word at its end, for LastWord."""
    counts, made = dict.fromkeys(("who", "what", "colour", "helper", "where"), 0), itertools.count()
    for index in range(20_000, 30_000):
        world, text = tell(SEED, index)
        rng = random.Random(index)
        for fact, word, bank in stories.draw(_facts(world), len(_facts(world)), rng):
            other = world["c"] if word == world["h"] else world["h"]
            passage = counts[fact] < OF_A_FACT and _said_twice(text, fact, word, other)
            if not passage:
                continue
            wrong = [other] if fact == "who" else []
            absent = [each for each in bank if each not in (word, *wrong, *_words(passage))]
            wrong += stories.draw(absent, 3 - len(wrong), rng)
            counts[fact] += 1
            answer = next(made) % 4
            choices = wrong[:answer] + [word] + wrong[answer:]
            yield {"fact": fact, "context": passage, "choices": choices, "answer": answer, "text": f"{passage} {word}"}
            break
        if set(counts.values()) == {OF_A_FACT}:
            return


def whole_stories() -> Iterator[Row]:
    """Stories of which no sentence is left out."""
    return ({"text": story(SEED, index)} for index in range(30_000, 30_000 + STORIES))


def openings() -> Iterator[Row]:
    """The beginnings of stories, 8 to 12 words."""
    for number in range(OPENINGS):
        yield {"prompt": " ".join(story(SEED, 40_000 + number).split()[: 8 + number % 5])}


SETS = {
    "agreement": agreement,
    "attractors": attractors,
    "pronouns": pronouns,
    "coherence": coherence,
    "stories": whole_stories,
    "openings": openings,
}


def content(name: str) -> bytes:
    """The file of a set."""
    return "".join(json.dumps(row) + "\n" for row in SETS[name]()).encode()


# ---- facts and people of a story


def _group(good: str, bad: str) -> tuple[str, str] | None:
    """(gender, form as "he", "his" or "him") of the last pronoun in which two passages differ. None unless it stands
    after the only name, which is that of its person, and no other word tells the gender."""
    words, others = _words(good), _words(bad)
    places = [place for place, (word, other) in enumerate(zip(words, others, strict=True)) if word != other]
    names = [word for word in words if word in NAMES]
    gender = PEOPLE.get(names[0]) if len(set(names)) == 1 else None
    if gender is None or not 1 <= len(places) <= 2 or words.index(names[0]) > places[-1]:
        return None
    if '"' in good or not GENDERS.isdisjoint(words):
        return None
    changed = [(words[place].lower(), others[place].lower()) for place in places]
    if any(pronoun not in stories.PRONOUNS[gender] for pronoun, _ in changed):
        return None  # it stands for a person who is not named
    return gender, changed[-1][gender == "girl"]


def _facts(world: dict[str, str]) -> list[tuple[str, str, list[str]]]:
    """(fact, its word, all words that could stand in its place)."""
    hues = _leaves(NODES["hue"])
    things = sorted(
        {row[0] for columns, table, *_ in stories.PLOT_NODES if columns[0] == "o" for row in table if " " not in row[0]}
    )
    facts = [("who", world[key], [*PEOPLE]) for key in ("h", "c") if world[key] in PEOPLE]
    facts += [
        ("helper", world["helper"], _leaves(NODES["helpword"])),
        ("where", world["bag"], _leaves(stories.FACT_NODES["bag"])),
    ]
    if world.get("o") in things:
        facts.append(("what", world["o"], things))
        colour = world["oa"].split()[-1]
        facts += [("colour", colour, hues)] if colour in hues else []
    return facts + [("colour", world["clothes"].split()[-2], hues)]


def _said_twice(text: str, fact: str, word: str, other: str) -> str | None:
    """A passage of a story that has a word, up to the place where it is said again. ``other`` is the name of the other
    character: a name can be known if this one stands earlier in the same sentence."""
    sentences = _split(text)
    places = [(at, match.start()) for at, each in enumerate(sentences) for match in re.finditer(rf"\b{word}\b", each)]
    for (first, _), (last, place) in itertools.pairwise(places):
        before, after = sentences[last][:place], sentences[last][place + len(word) :]
        passage = " ".join([*sentences[first:last], before.rstrip()])
        is_fit = before.endswith(" ") and not before.endswith((" a ", " an ")) and not after.startswith("'s")
        if fact == "who":
            is_fit &= other in _words(before)
        elif fact == "where":
            is_fit &= before.endswith((" his ", " her "))
        if first < last and is_fit and len(passage) <= LONGEST["coherence"] and _is_new(sentences[first]):
            return passage
    return None


# ---- words and sentences


def _sentences(indices: Iterable[int]) -> Iterator[str]:
    return itertools.chain.from_iterable(_split(story(SEED, index)) for index in indices)


def _split(text: str) -> list[str]:
    """The sentences of a story. One that begins with a quotation ends after the words that say who spoke."""
    sentences = [""]
    for piece in SENTENCE_END.split(text):
        is_open = sentences[-1].count('"') % 2 == 1
        if is_open or sentences[-1].endswith('"'):
            sentences[-1] += " " + piece
        else:
            sentences.append(piece)
    return sentences[1:]


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def _kind_of_word(word: str) -> str:
    """A word in lower case; all names are one word."""
    return "NAME" if word.strip(",.") in NAMES else word.strip(",.").lower()


def _is_new(sentence: str) -> bool:
    return sentence not in _trained_sentences()


@functools.cache
def _trained_sentences() -> frozenset[str]:
    return frozenset(sentence for index in TRAINED_ON for sentence in _split(story(0, index)))


def _leaves(node: Node) -> list[str]:
    """The texts of all expansions of a node, each once."""
    return sorted(set(_expansions(node)))


def _expansions(node: Node) -> list[str]:
    if isinstance(node, list):
        return [text for each in node for text in _expansions(each)]
    if isinstance(node, tuple):
        return ["".join(texts) for texts in itertools.product(*map(_expansions, node))]
    return [node]


def _with_exchanged_pronouns(index: int) -> str:
    """The same story, in which girls are "he" and boys are "she"."""
    table = dict(stories.PRONOUNS)
    stories.PRONOUNS.update(girl=table["boy"], boy=table["girl"])
    try:
        return story(SEED, index)
    finally:
        stories.PRONOUNS.update(table)


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(prog="python -m experiments.story_items.make", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write them (default: %(default)s)")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = content(name)
        write_bytes(folder / f"{name}.jsonl", lines)
        print(f"{name}: {len(lines.splitlines())} items, {len(lines):,} bytes")


if __name__ == "__main__":
    main()
