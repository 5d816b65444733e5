"""Episodes of the embedded world: a private knowledge base and one question about it.

Every episode draws its own facts, so an answer can be found but never remembered. An episode is a pure function of
``(seed, split, index, hops)``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from appo_lightning.errors import ConfigurationError
from appo_lightning.tasks.lookup.vocabulary import (
    CITIES,
    CITY_ATTRIBUTES,
    PEOPLE,
    PERSON_ATTRIBUTES,
    VALUES,
)

Split = Literal["train", "validation"]
Operator = Literal["sum", "difference"]

NUM_PEOPLE = 4
NUM_CITIES = 3
MAX_HOPS = 5


@dataclass(frozen=True, slots=True)
class Operand:
    """One number that the question needs: an attribute of a person, or of the city of a person."""

    attribute: str
    person: str
    via_city: bool

    @property
    def hops(self) -> int:
        """Searches it takes to find the number."""
        return 2 if self.via_city else 1

    @property
    def phrase(self) -> str:
        """How the question names it."""
        return f"the {self.attribute} of {'the city of ' if self.via_city else ''}{self.person}"


@dataclass(frozen=True, slots=True)
class Episode:
    """A knowledge base, a question about it and the answer."""

    id: str
    facts: dict[tuple[str, str], str]  # (attribute, entity) -> value, in the order of the documents
    documents: list[str]  # the facts as sentences
    operands: tuple[Operand, ...]  # one, or two joined by the operator
    operator: Operator | None
    answer: str

    @property
    def hops(self) -> int:
        """Tool calls of the shortest solution."""
        return sum(operand.hops for operand in self.operands) + (self.operator is not None)

    @property
    def question(self) -> str:
        """The question in words."""
        first = self.operands[0].phrase
        if self.operator is None:
            return f"What is {first}?"
        joint = "sum of" if self.operator == "sum" else "difference between"
        return f"What is the {joint} {first} and {self.operands[1].phrase}?"


def sentence(attribute: str, entity: str, value: str) -> str:
    """The document that states a fact."""
    return f"The {attribute} of {entity} is {value}."


def python_code(operator: Operator, first: str, second: str) -> str:
    """The code that combines two numbers."""
    return f"print({first} + {second})" if operator == "sum" else f"print(abs({first} - {second}))"


def combine(operator: Operator, first: str, second: str) -> str:
    """What ``python_code`` prints."""
    return str(int(first) + int(second) if operator == "sum" else abs(int(first) - int(second)))


def check_hops(hops: Sequence[float]) -> tuple[float, ...]:
    """Validate the weights of questions of 1, 2, ... hops.

    Raises:
        ConfigurationError: more than five weights, a negative one, or none above zero.
    """
    if not 1 <= len(hops) <= MAX_HOPS or min(hops) < 0 or max(hops) <= 0:
        raise ConfigurationError(
            f"hops must be 1 to {MAX_HOPS} weights >= 0, one of them above 0, got {list(hops)}: "
            "[1, 1] asks questions of one and of two hops equally often"
        )
    return tuple(hops)


def draw_episode(seed: int, split: Split, index: int, hops: Sequence[float]) -> Episode:
    """Draw an episode.

    An episode belongs to the training or to the validation split by a checksum of its text, and is drawn anew until it
    belongs to ``split``: no seed makes a validation episode appear in training.

    Args:
        seed: any integer.
        split: ``"train"`` or ``"validation"``.
        index: number of the episode, from 0.
        hops: weights of questions of 1, 2, ... hops, at most five.
    """
    rng = random.Random(f"lookup/{seed}/{split}/{index}")
    while True:
        episode = _draw(rng, f"lookup-{split}-{seed}-{index}", hops)
        if split_of(episode) == split:
            return episode


def split_of(episode: Episode) -> Split:
    """The split that the text of the episode belongs to."""
    text = "\n".join([*episode.documents, episode.question])
    return "validation" if zlib.crc32(text.encode()) & 1 else "train"


def _draw(rng: random.Random, episode_id: str, hops: Sequence[float]) -> Episode:
    people, cities = rng.sample(PEOPLE, NUM_PEOPLE), rng.sample(CITIES, NUM_CITIES)
    keys = [(attribute, person) for person in people for attribute in PERSON_ATTRIBUTES]
    keys += [(attribute, city) for city in cities for attribute in CITY_ATTRIBUTES]
    # Values are distinct within an episode: a wrong fact never holds the right number.
    pairs = list(zip(keys, map(str, rng.sample(VALUES, len(keys))), strict=True))
    pairs += [(("city", person), rng.choice(cities)) for person in people]
    rng.shuffle(pairs)
    facts = dict(pairs)
    documents = [sentence(attribute, entity, value) for (attribute, entity), value in pairs]

    (num_hops,) = rng.choices(range(1, len(hops) + 1), weights=hops)
    operator: Operator | None = None
    if num_hops <= 2:
        routes = [num_hops == 2]
    else:
        operator = rng.choice(("sum", "difference"))
        routes = [num_hops == 5, num_hops >= 4]
        rng.shuffle(routes)
    operands = tuple(
        Operand(rng.choice(CITY_ATTRIBUTES if via_city else PERSON_ATTRIBUTES), person, via_city)
        for person, via_city in zip(people, routes, strict=False)
    )
    numbers = [facts[o.attribute, facts["city", o.person] if o.via_city else o.person] for o in operands]
    answer = numbers[0] if operator is None else combine(operator, *numbers)
    return Episode(episode_id, facts, documents, operands, operator, answer)
