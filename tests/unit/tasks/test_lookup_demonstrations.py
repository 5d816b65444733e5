import re

import pytest

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tasks.demonstrations import JSONLDemonstrations, Segment, split_results
from appo_lightning.tasks.lookup import LookupDemonstrations
from appo_lightning.tasks.lookup.vocabulary import FILLERS
from appo_lightning.tasks.lookup.world import combine

CALL = re.compile(r"<(search|python)>(.*?)</\1><result>(.*?)</result>")


def test_the_same_arguments_give_the_same_demonstration():
    one, two = LookupDemonstrations(seed=3), LookupDemonstrations(size=100, seed=3)
    assert [one.demonstration(i) for i in range(20)] == [two.demonstration(i) for i in range(20)]


def test_without_errors_every_demonstration_gives_the_right_answer():
    source = LookupDemonstrations(error_rate=0.0, hops=[1, 1, 1, 1, 1])
    for i in range(300):
        demonstration, episode = source.demonstration(i), source.tasks.episode(i)
        assert demonstration.correct
        assert not any(demonstration.slips)
        assert demonstration.response.endswith(f"<answer>\\boxed{{{episode.answer}}}</answer>")
        assert len(CALL.findall(demonstration.response)) == episode.hops


def test_decisions_are_wrong_at_the_set_rate():
    source = LookupDemonstrations(error_rate=0.2)
    slips = [slip for i in range(2000) for slip in source.demonstration(i).slips]
    # About 5000 decisions, sd of the share 0.006; redrawing lucky demonstrations moves it by less.
    assert sum(map(bool, slips)) / len(slips) == pytest.approx(0.2, abs=0.025)
    assert set(slips) == {None, "attribute", "person", "shortcut", "skip", "operator", "operand", "value"}


def test_a_wrong_decision_ends_in_a_wrong_answer():
    source = LookupDemonstrations(error_rate=0.3, hops=[1, 1, 1, 1, 1])
    for i in range(500):
        demonstration, episode = source.demonstration(i), source.tasks.episode(i)
        assert demonstration.correct == (not any(demonstration.slips))
        assert demonstration.correct == (demonstration.answer == episode.answer)


def test_results_are_what_the_knowledge_base_and_the_code_say():
    source = LookupDemonstrations(error_rate=0.3, hops=[1, 1, 1, 1, 1])
    for i in range(300):
        facts = source.tasks.episode(i).facts
        for tool, argument, result in CALL.findall(source.demonstration(i).response):
            if tool == "search":
                attribute, entity = argument.split(" of ")
                assert result == f"The {attribute} of {entity} is {facts[attribute, entity]}."
            else:
                first, second = re.findall(r"\d+", argument)
                assert result == combine("difference" if "abs" in argument else "sum", first, second)


def test_fillers_are_words_of_the_list_and_as_many_as_asked():
    source = LookupDemonstrations(fillers=(2, 3))
    for i in range(50):
        demonstration = source.demonstration(i)
        thoughts = re.findall(r"<think>(.*?)</think>", demonstration.response)
        words = [thought.split()[:-1] for thought in thoughts]
        assert all(len(w) in (2, 3) and set(w) <= set(FILLERS) for w in words)
        fillers = [segment.text for segment in demonstration.segments if segment.label == "filler"]
        assert fillers == [f" {word}" for w in words for word in w]


def test_only_results_are_labelled_as_tool():
    for i in range(50):
        for segment in LookupDemonstrations().demonstration(i).segments:
            assert (segment.label == "tool") == segment.text.startswith("<result>")


@pytest.mark.parametrize(
    ("options", "message"), [({"error_rate": 1.0}, "error_rate"), ({"fillers": (2, 1)}, "fillers")]
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LookupDemonstrations(**options)


def test_a_response_is_cut_at_its_results():
    assert split_results("a<result>b\nc</result>d<result>e</result>") == [
        Segment("a", "text"),
        Segment("<result>b\nc</result>", "tool"),
        Segment("d", "text"),
        Segment("<result>e</result>", "tool"),
    ]


def test_demonstrations_are_read_from_json_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "żółw\u2028?"}], "response": "<s>x</s><result>y</result>z"}\n\n',
        encoding="utf-8",
    )
    source = JSONLDemonstrations(str(path))
    assert len(source) == 1
    assert source.demonstration(0).messages == [{"role": "user", "content": "żółw\u2028?"}]
    assert [segment.label for segment in source.demonstration(0).segments] == ["text", "tool", "text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not JSON"),
        ("[]", '"messages" must be'),
        ('{"messages": [], "response": "x"}', '"messages" must be'),
        ('{"messages": [{"role": "user"}], "response": "x"}', '"messages" must be'),
        ('{"messages": [{"role": "user", "content": 3}], "response": "x"}', '"messages" must be'),
        ("\udcff", "expected UTF-8, found invalid start byte"),
        ('{"messages": [{"role": "user", "content": "q"}], "response": ""}', '"response" must be text'),
        ('{"messages": [{"role": "user", "content": "q"}], "response": "<result>r</result>"}', "directly before each"),
        ("", "holds no demonstrations"),
    ],
)
def test_unusable_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        JSONLDemonstrations(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the demonstrations .*none\.jsonl"):
        JSONLDemonstrations(str(tmp_path / "none.jsonl"))
