"""Prose without end, made from word lists: a haystack for machines that hold no essays, and behind essays that end."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from ragkit.bench.words import ADJECTIVES, NOUNS, person_name, town_name

_SENTENCES = (
    "{person} carried {a_thing} from {town} to {town2} and never said why.",
    "Near {town} {a_thing} stood beside {a_thing2}, and travellers took it for a sign.",
    "Most people in {town} prefer {a_thing}, though some still ask for {a_thing2}.",
    "When the {noun} was moved, {person} wrote a letter about it to {person2}.",
    "In {season} the {noun} of {town} looks {adjective}, almost {adjective2}.",
    "{person} thought that {a_thing} would last longer than {a_thing2}.",
    "There was little to see in {town} except {a_thing} and a path that led down to the {noun}.",
    "Nobody remembered who had painted the {noun} so {adjective}.",
    "It took {person} {number} days to mend the {noun}, and {number2} more to find {a_thing}.",
    "The road between {town} and {town2} passes {a_thing} on its way through the hills.",
    "They sold {a_thing} at the market in {town}, and bought {number} sacks of flour.",
    "What {person} liked about {town} was the {adjective} {noun} by the gate.",
    "Every {season} someone leaves {a_thing} on the steps of the hall.",
    "If the {noun} is {adjective} enough, {a_thing} can be kept beside it for years.",
    "“Bring {a_thing},” said {person}, “and leave {a_thing2} where it is.”",
    "An old map of {town} shows {a_thing} where the school stands now.",
    "For {number} years {person} looked after the {noun}; then {person2} took over.",
    "Rain fell on the {noun}, on the {noun2}, and on all of {town}.",
)
_SEASONS = ("spring", "summer", "autumn", "winter")
_VOWELS = ("a", "e", "i", "o", "un", "up", "ur")
_PARAGRAPH = 6  # sentences


def made_sentences(seed: int) -> Iterator[str]:
    """Yield sentences, each with the white space that stands before it: an empty line after every sixth one."""
    chance = Random(f"made text {seed}")
    number = 0
    while True:
        sentence = chance.choice(_SENTENCES).format(
            person=person_name(chance),
            person2=person_name(chance),
            town=town_name(chance),
            town2=town_name(chance),
            a_thing=_thing(chance),
            a_thing2=_thing(chance),
            noun=chance.choice(NOUNS),
            noun2=chance.choice(NOUNS),
            adjective=chance.choice(ADJECTIVES),
            adjective2=chance.choice(ADJECTIVES),
            season=chance.choice(_SEASONS),
            number=chance.randint(3, 90),
            number2=chance.randint(3, 90),
        )
        yield (" " if number % _PARAGRAPH else "\n\n") + sentence
        number += 1


def _thing(chance: Random) -> str:
    adjective = chance.choice(ADJECTIVES)
    return f"{'an' if adjective.startswith(_VOWELS) else 'a'} {adjective} {chance.choice(NOUNS)}"
