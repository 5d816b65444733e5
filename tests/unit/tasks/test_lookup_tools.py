"""The embedded world meets the real tools, the real parser and the real reward."""

import re

import pytest

from appo_lightning.rewards.tagged import AnswerReward
from appo_lightning.rollout.formats.tags import ResultEncoder, TagFormat
from appo_lightning.rollout.imitation import encode_demonstration
from appo_lightning.rollout.prompts import build_task
from appo_lightning.tasks.lookup import LookupDemonstrations
from appo_lightning.tasks.lookup.tokenizer import build_tokenizer
from appo_lightning.tools.python import PythonTool
from appo_lightning.tools.search import SearchTool

TOKENIZER = build_tokenizer()
TAGS = TagFormat().bind(TOKENIZER, [])
CALL = re.compile(r"<(search|python)>(.*?)</\1><result>(.*?)</result>")


@pytest.fixture(scope="module")
def tools():
    search, python = SearchTool(top_k=1), PythonTool(timeout_s=10)
    yield {"search": search, "python": python}
    search.close()
    python.close()


@pytest.mark.parametrize("error_rate", [0.0, 0.3])
def test_the_real_tools_give_the_results_of_the_demonstrations(tools, error_rate):
    source = LookupDemonstrations(hops=[1, 1, 1, 1, 1], error_rate=error_rate)
    calls = 0
    for i in range(60):
        task = build_task(source.tasks.row(i), TOKENIZER, max_prompt_tokens=100)
        sessions = {name: tool.open(task) for name, tool in tools.items()}
        for name, argument, result in CALL.findall(source.demonstration(i).response):
            assert sessions[name].call(argument).strip() == result
            calls += 1
        for session in sessions.values():
            session.close()
    assert calls > 100


def test_results_enter_a_rollout_as_the_tokens_of_the_demonstration():
    encoder = ResultEncoder(TOKENIZER, ["search", "python"])
    source = LookupDemonstrations()
    for i in range(50):
        for segment in source.demonstration(i).segments:
            if segment.label == "tool":
                text = segment.text.removeprefix("<result>").removesuffix("</result>")
                ids, shown = encoder.encode(text, max_tokens=100)
                assert f"<result>{shown}</result>" == segment.text
                assert ids == TOKENIZER.encode(segment.text, add_special_tokens=False)


def test_the_prompt_of_a_demonstration_is_the_prompt_of_its_task():
    source = LookupDemonstrations()
    for i in range(50):
        prompt = build_task(source.tasks.row(i), TOKENIZER, max_prompt_tokens=100).prompt_ids
        assert (
            encode_demonstration(source.demonstration(i), TOKENIZER, TAGS, max_length=200).token_ids[: len(prompt)]
            == prompt
        )


@pytest.mark.parametrize("error_rate", [0.0, 0.3])
def test_the_reward_agrees_with_the_demonstration(error_rate):
    source = LookupDemonstrations(hops=[1, 1, 1, 1, 1], error_rate=error_rate)
    reward = AnswerReward()
    for i in range(100):
        task = build_task(source.tasks.row(i), TOKENIZER, max_prompt_tokens=100)
        demonstration = source.demonstration(i)
        assert reward.score(task, demonstration.response).success == demonstration.correct
