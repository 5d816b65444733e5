import pytest

from appo_lightning.errors import ConfigurationError
from appo_lightning.tasks.lookup import LookupTasks
from appo_lightning.tasks.lookup.vocabulary import LARGEST_NUMBER
from appo_lightning.tasks.lookup.world import Episode, combine, draw_episode, sentence, split_of


def solve(episode: Episode) -> str:
    """The answer, found by reading the documents only."""
    facts = {
        tuple(document[len("The ") : -1].split(" is ")[0].split(" of ")): document[:-1].split(" is ")[1]
        for document in episode.documents
    }
    numbers = []
    for operand in episode.operands:
        entity = facts["city", operand.person] if operand.via_city else operand.person
        numbers.append(facts[operand.attribute, entity])
    return numbers[0] if episode.operator is None else combine(episode.operator, *numbers)


def test_the_same_seed_and_index_give_the_same_row():
    one, two = LookupTasks("train", 50, seed=3), LookupTasks("train", 60, seed=3)
    assert [one.row(i) for i in range(50)] == [two.row(i) for i in range(50)]


def test_rows_do_not_change_between_releases():
    # Written down from a first run: a change here changes every recorded result of the embedded world.
    row = LookupTasks("train", 1, seed=0, hops=[0, 0, 0, 1]).row(0)
    assert row.id == "lookup-train-0-0"
    assert row.messages[0]["content"] == "What is the sum of the population of the city of Mizu and the age of Mila?"
    assert row.references == ("153",)


def test_another_seed_gives_other_questions():
    one, two = LookupTasks("train", 200, seed=0), LookupTasks("train", 200, seed=1)
    same = [one.row(i).metadata["documents"] == two.row(i).metadata["documents"] for i in range(200)]
    assert not any(same)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_episode_belongs_to_its_split_by_its_text(split):
    assert {split_of(draw_episode(seed, split, i, [1, 1, 1, 1])) for seed in (0, 9) for i in range(100)} == {split}


@pytest.mark.parametrize("hops", [1, 2, 3, 4, 5])
def test_the_answer_follows_from_the_documents(hops):
    weights = [0.0] * (hops - 1) + [1.0]
    for i in range(100):
        episode = draw_episode(0, "train", i, weights)
        assert episode.hops == hops
        assert solve(episode) == episode.answer
        assert 0 <= int(episode.answer) <= LARGEST_NUMBER


def test_difficulty_follows_the_weights():
    tasks = LookupTasks("train", 1000, hops=[3, 0, 1])
    hops = [tasks.row(i).metadata["hops"] for i in range(1000)]
    assert set(hops) == {1, 3}
    assert hops.count(1) == pytest.approx(750, abs=60)  # binomial, sd 14


def test_values_of_an_episode_are_distinct():
    for i in range(50):
        values = [v for (attribute, _), v in draw_episode(0, "train", i, [1]).facts.items() if attribute != "city"]
        assert len(set(values)) == len(values)


def test_a_fact_reads_as_a_sentence():
    assert sentence("age", "Bako", "37") == "The age of Bako is 37."


@pytest.mark.parametrize("hops", [[], [0, 0], [1, -1], [1] * 6])
def test_impossible_weights_are_refused(hops):
    with pytest.raises(ConfigurationError, match="hops must be 1 to 5 weights"):
        LookupTasks(hops=hops)


@pytest.mark.parametrize(("options", "message"), [({"split": "test"}, "split must be"), ({"size": 0}, "at least 1")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LookupTasks(**options)


def test_an_index_beyond_the_size_is_refused():
    with pytest.raises(IndexError):
        LookupTasks(size=3).row(3)
