"""Passages about people and towns that do not exist, and questions about them that take one passage or two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from ragkit.bench.words import ADJECTIVES, NOUNS, person_name, town_name

_TRADES = ("baker", "clockmaker", "painter", "surveyor", "botanist", "printer", "sailor", "teacher", "mason", "weaver")


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question, its answer, and the passages that say it."""

    text: str
    answer: str
    passages: tuple[str, ...]


def made_questions(seed: int, count: int, hops: int) -> list[MadeQuestion]:
    """Return `count` questions about different people, whose answers take `hops` passages: 1 or 2."""
    chance = Random(f"made facts {seed} {hops}")
    questions: list[MadeQuestion] = []
    people: set[str] = set()
    towns: set[str] = set()
    while len(questions) < count:
        person, town, river = person_name(chance), town_name(chance), town_name(chance)
        if person in people or town in towns:
            continue
        people.add(person)
        towns.add(town)
        about_person, about_town = _person(chance, person, town), _town(chance, town, river)
        if hops == 1:
            questions.append(MadeQuestion(f"In which town was {person} born?", town, (about_person,)))
        else:
            text = f"On which river does the town lie in which {person} was born?"
            questions.append(MadeQuestion(text, river, (about_person, about_town)))
    return questions


def made_passages(seed: int) -> Iterator[str]:
    """Yield passages about other people and towns without end."""
    chance = Random(f"made passages {seed}")
    while True:
        yield _person(chance, person_name(chance), town_name(chance))
        yield _town(chance, town_name(chance), town_name(chance))


def _person(chance: Random, name: str, town: str) -> str:
    born = chance.randint(1700, 1940)
    return (
        f"{name} was a {chance.choice(_TRADES)}, born in {town} in {born}. Of {chance.randint(2, 9)} children, "
        f"{name.split()[0]} alone left home, and kept {chance.choice(ADJECTIVES)} notes about every "
        f"{chance.choice(NOUNS)} on the way. {chance.randint(12, 90)} of them are shown in the {chance.choice(NOUNS)} "
        f"museum; the others were lost in {born + chance.randint(50, 90)}."
    )


def _town(chance: Random, name: str, river: str) -> str:
    return (
        f"{name} lies on the river {river} and has about {chance.randint(9, 990)}00 inhabitants. It is known for the "
        f"{chance.choice(ADJECTIVES)} {chance.choice(NOUNS)} on its market square, put up in "
        f"{chance.randint(1500, 1900)}, and for the {chance.choice(NOUNS)} fair."
    )
