"""Noisy demonstrations of the embedded world, with the truth about every piece.

A demonstrator solves the episode with tools. Before each step it mutters filler words, drawn uniformly: uncertain but
irrelevant. At each decision it errs at a set rate and then goes on as if it had not, so the final answer is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from appo_lightning.errors import ConfigurationError
from appo_lightning.tasks.demonstrations import Demonstration, DemonstrationSource, Label, Segment
from appo_lightning.tasks.lookup.source import LookupTasks, task_row
from appo_lightning.tasks.lookup.vocabulary import CITY_ATTRIBUTES, FILLERS, PERSON_ATTRIBUTES
from appo_lightning.tasks.lookup.world import Episode, Operand, combine, python_code, sentence


@dataclass(slots=True)
class LookupDemonstration(Demonstration):
    """A demonstration and what is true about it."""

    answer: str = ""  # what the demonstration answers
    correct: bool = True
    slips: list[str | None] = field(default_factory=list)  # per decision: the kind of error, None if right


class LookupDemonstrations(DemonstrationSource):
    """Demonstrations of the embedded world.

    Args:
        size: number of demonstrations; those of a longer list start like those of a shorter one.
        seed: another seed gives other episodes. They belong to the training split.
        hops: weights of questions of 1, 2, ... hops, as in ``LookupTasks``.
        error_rate: probability that a decision is wrong, in [0, 1).
        fillers: least and largest number of filler words before a step.
    """

    def __init__(
        self,
        size: int = 100_000,
        seed: int = 0,
        hops: Sequence[float] = (1, 1, 1, 1),
        error_rate: float = 0.2,
        fillers: tuple[int, int] = (1, 2),
    ) -> None:
        if not 0 <= error_rate < 1:
            raise ConfigurationError(f"error_rate must be in [0, 1), got {error_rate}")
        if not 0 <= fillers[0] <= fillers[1]:
            raise ConfigurationError(f"fillers must be [least, largest] with 0 <= least <= largest, got {fillers}")
        self.tasks = LookupTasks("train", size, seed, hops)
        self.error_rate = error_rate
        self.fillers = fillers

    def __len__(self) -> int:
        return len(self.tasks)

    def demonstration(self, index: int) -> LookupDemonstration:
        episode = self.tasks.episode(index)
        return demonstrate(episode, random.Random(f"demonstration/{episode.id}"), self.error_rate, self.fillers)


def demonstrate(
    episode: Episode, rng: random.Random, error_rate: float, fillers: tuple[int, int]
) -> LookupDemonstration:
    """Write a demonstration of ``episode``.

    Args:
        episode: what to solve.
        rng: source of errors and fillers.
        error_rate: probability that a decision is wrong.
        fillers: least and largest number of filler words before a step.
    """
    while True:
        demonstrator = _Demonstrator(episode, rng, error_rate, fillers)
        demonstrator.solve()
        correct = demonstrator.answer == episode.answer
        # Two errors can cancel out; such luck would teach that errors pay.
        if correct == (not any(demonstrator.slips)):
            messages = task_row(episode).messages
            return LookupDemonstration(
                messages, demonstrator.segments, demonstrator.answer, correct, demonstrator.slips
            )


class _Demonstrator:
    def __init__(self, episode: Episode, rng: random.Random, error_rate: float, fillers: tuple[int, int]) -> None:
        self.episode, self.rng, self.error_rate, self.fillers = episode, rng, error_rate, fillers
        self.segments: list[Segment] = []
        self.slips: list[str | None] = []
        self.answer = ""

    def solve(self) -> None:
        numbers: list[str] = []
        for operand in self.episode.operands:
            # Before the second operand the demonstrator may believe that it is done.
            if numbers and self._decide("skip"):
                return self._give(numbers[0], "decision")
            numbers.append(self._find(operand, plan="decision" if numbers else "format"))
        if self.episode.operator is None:
            return self._give(numbers[0], "format")
        if self._decide("skip"):
            return self._give(numbers[1], "decision")
        result = self._compute(numbers)
        if self._decide("value"):
            return self._give(self.rng.choice([n for n in numbers if n != result]), "format", "decision")
        return self._give(result, "format", "decision")

    def _decide(self, *kinds: str) -> str | None:
        """The kind of error made at this decision, or None."""
        slip = self.rng.choice(kinds) if self.rng.random() < self.error_rate else None
        self.slips.append(slip)
        return slip

    def _find(self, operand: Operand, plan: Label) -> str:
        rivals = [other.person for other in self.episode.operands if other.person != operand.person]
        wrong_person = ("person",) if rivals else ()
        person = operand.person
        person_label: Label = "decision" if rivals else "copied"
        if not operand.via_city:
            slip = self._decide("attribute", *wrong_person)
            attribute = self._other(PERSON_ATTRIBUTES, operand.attribute) if slip == "attribute" else operand.attribute
            return self._search(attribute, rivals[0] if slip == "person" else person, plan, person_label)
        slip = self._decide("shortcut", *wrong_person)
        if slip == "shortcut":  # a fact about the person is taken for one about the city
            return self._search(self.rng.choice(PERSON_ATTRIBUTES), person, plan, person_label)
        city = self._search("city", rivals[0] if slip == "person" else person, plan, person_label)
        slip = self._decide("attribute")
        attribute = self._other(CITY_ATTRIBUTES, operand.attribute) if slip else operand.attribute
        return self._search(attribute, city, "format", "copied")

    def _other(self, words: tuple[str, ...], word: str) -> str:
        return self.rng.choice([other for other in words if other != word])

    def _think(self, plan: str, label: Label) -> None:
        self._write("<think>", "format")
        for _ in range(self.rng.randint(*self.fillers)):
            self._write(f" {self.rng.choice(FILLERS)}", "filler")
        self._write(f" {plan}", label)
        self._write("</think>", "format")

    def _search(self, attribute: str, entity: str, plan: Label, entity_label: Label) -> str:
        self._think("search", plan)
        self._write("<search>", "format")
        self._write(attribute, "decision")
        self._write(" of", "format")
        self._write(f" {entity}", entity_label)
        self._write("</search>", "format")
        value = self.episode.facts[attribute, entity]
        self._write(f"<result>{sentence(attribute, entity, value)}</result>", "tool")
        return value

    def _compute(self, numbers: list[str]) -> str:
        operator = self.episode.operator
        assert operator is not None
        first, second = numbers
        slip = self._decide("operator", "operand")
        if slip == "operator":
            operator = "difference" if operator == "sum" else "sum"
        if slip == "operand":
            second = first
        self._think("compute", "decision")
        self._write("<python>print", "format")
        if operator == "sum":
            self._write("(", "decision")
        else:
            self._write("(abs", "decision")
            self._write("(", "format")
        self._write(first, "copied")
        self._write(" + " if operator == "sum" else " - ", "format")
        self._write(second, "decision")
        self._write(")" if operator == "sum" else "))", "format")
        self._write("</python>", "format")
        assert "".join(s.text for s in self.segments).endswith(
            f"<python>{python_code(operator, first, second)}</python>"
        )
        result = combine(operator, first, second)
        self._write(f"<result>{result}</result>", "tool")
        return result

    def _give(self, value: str, plan: Label, value_label: Label = "copied") -> None:
        self._think("answer", plan)
        self._write("<answer>\\boxed{", "format")
        self._write(value, value_label)
        self._write("}</answer>", "format")
        self.answer = value

    def _write(self, text: str, label: Label) -> None:
        self.segments.append(Segment(text, label))
