"""CassetteTool: what was recorded is what is replayed, without the tool."""

import copy
import threading
import time

import pytest
from jsonargparse import ArgumentParser

from appo_lightning.errors import ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.rollout.sessions import EpisodeSession
from appo_lightning.tools.base import StatelessTool, Tool, ToolSession
from appo_lightning.tools.cassette import CassetteTool, _plain
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task, ToolCall

TASK, OTHER = Task("task-0", [1], ("x",)), Task("task-1", [1], ("x",))


class Clock(StatelessTool):
    """Never answers twice alike."""

    name = "clock"
    timeout_s = 0.2

    def __init__(self, zone: str = "UTC") -> None:
        self.zone = zone
        self._calls = 0

    def run(self, argument, task):
        self._calls += 1
        if argument == "fail":
            raise ToolFailure(f"broken {self._calls}", "malformed")
        if argument == "crash":
            raise KeyError(self._calls)
        if argument == "hang":
            time.sleep(0.5)
        return f"{argument} {self._calls}"


class Counter(Tool):
    """Adds up; the answers of a trajectory depend on all its calls."""

    name = "counter"
    stateful = True

    def __init__(self) -> None:
        self._sessions: list[CounterSession] = []

    def open(self, task):
        self._sessions.append(CounterSession())
        return self._sessions[-1]


class CounterSession(ToolSession):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.closed = False

    def call(self, argument):
        self.seen.append(int(argument))
        return str(sum(self.seen))

    def close(self):
        self.closed = True


class Gone(Clock):
    """The same tool, on a machine where it cannot work."""

    def open(self, task):
        raise AssertionError("a replay must not touch the tool")


@pytest.fixture
def make(tmp_path, request):
    def make_cassette(tool, mode="record"):
        cassette = CassetteTool(tool, str(tmp_path / "calls.sqlite"), mode)
        request.addfinalizer(cassette.close)
        return cassette

    return make_cassette


def outcome(session, argument):
    try:
        return session.call(argument)
    except ToolFailure as failure:
        return str(failure), failure.kind


def test_answers_and_failures_are_replayed_as_they_were(make, monkeypatch):
    calls = ["now", "fail", "crash", "now", "\ud800", ""]
    session = make(Clock()).open(TASK)
    recorded = [outcome(session, argument) for argument in calls]
    assert recorded[:4] == ["now 1", ("broken 2", "malformed"), ("KeyError: 3", "error"), "now 1"]
    monkeypatch.setattr(Clock, "open", Gone.open)
    replay = make(Clock(), "replay").open(TASK)
    assert [outcome(replay, argument) for argument in calls] == recorded


def test_a_time_out_is_on_record(make):
    assert outcome(make(Clock()).open(TASK), "hang") == ("no answer within 0.2 seconds", "timeout")
    started = time.monotonic()
    assert outcome(make(Clock(), "replay").open(TASK), "hang") == ("no answer within 0.2 seconds", "timeout")
    assert time.monotonic() - started < 0.1


def test_a_session_is_closed_after_a_call_that_was_given_up():
    log = []

    class Slow(ToolSession):
        def call(self, argument):
            time.sleep(0.2)
            log.append("call ends")

        def close(self):
            log.append("closed")

    class SlowTool(Tool):
        name, timeout_s = "slow", 0.05

        def open(self, task):
            return Slow()

    session = CassetteTool(SlowTool(), ":memory:").open(TASK)
    assert outcome(session, "x")[1] == "timeout"
    session.close()
    session.close()
    time.sleep(0.3)
    assert log == ["call ends", "closed"]


@pytest.mark.parametrize(
    ("tool", "task", "argument"),
    [
        (Clock("UTC"), TASK, "later"),
        (Clock("CET"), TASK, "now"),
        (Clock("UTC"), OTHER, "now"),
        (Clock("UTC"), Task("task-0", [1], ("x",), {"documents": ["a"]}), "now"),
    ],
    ids=["argument", "options", "task", "metadata"],
)
def test_a_call_that_was_not_recorded_stops_a_replay(make, tool, task, argument):
    make(Clock("UTC")).open(TASK).call("now")
    with pytest.raises(ToolBroken, match=r"holds no answer of 'clock' to '\w+' here; the tool's options, the task or"):
        make(tool, "replay").open(task).call(argument)


def test_time_limit_and_description_may_change(make):
    answer = make(Clock()).open(TASK).call("now")
    tool = Clock()
    tool.timeout_s, tool.description = 60.0, "Tells the time."
    assert make(tool, "replay").open(TASK).call("now") == answer


def test_the_answers_of_a_stateful_tool_depend_on_the_earlier_calls(make):
    session = make(Counter()).open(TASK)
    assert [session.call(number) for number in "123"] == ["1", "3", "6"]
    replay = make(Counter(), "replay")
    assert [replay.open(TASK).call("1"), *map(replay.open(TASK).call, "12")] == ["1", "1", "3"]
    with pytest.raises(ToolBroken, match="holds no answer of 'counter' to '2'"):
        replay.open(TASK).call("2")


def test_a_branch_is_replayed_with_the_calls_of_its_prefix(make):
    prefix = [ToolCall("counter", number, "", 0, 0, succeeded=True, seconds=0.0) for number in "12"]
    make(Counter()).open(TASK).call("1")
    recording = make(Counter())
    assert EpisodeSession(recording, TASK, prefix).call("5") == "8"
    assert EpisodeSession(make(Counter(), "replay"), TASK, prefix).call("5") == "8"


def test_a_tool_catches_up_with_calls_that_were_answered_from_the_file(make):
    first = make(Counter()).open(TASK)
    assert [first.call(number) for number in "12"] == ["1", "3"]
    tool = Counter()
    session = make(tool).open(TASK)
    assert [session.call(number) for number in "1234"] == ["1", "3", "6", "10"]
    assert tool._sessions[0].seen == [1, 2, 3, 4]
    session.close()
    assert tool._sessions[0].closed


def test_equal_calls_at_the_same_time_get_one_answer(make):
    cassette, answers = make(Clock()), []
    threads = [threading.Thread(target=lambda: answers.append(cassette.open(TASK).call("now"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 16
    assert len(set(answers)) == 1


def test_look_ups_are_counted(make):
    cassette = make(Clock())
    for _ in range(3):
        cassette.open(TASK).call("now")
    assert cassette.take_counts() == {"lookups": 3, "hits": 2}
    assert cassette.take_counts() == {}


def test_a_cassette_looks_like_its_tool_and_can_be_copied(make):
    cassette = copy.deepcopy(make(Counter()))
    assert (cassette.name, cassette.stateful, cassette.timeout_s) == ("counter", True, 10.0)
    assert cassette.open(TASK).call("1") == "1"
    cassette.close()


def test_options_are_the_same_in_every_process():
    class Holder:
        def __init__(self):
            self.path, self._secret = {"b": {3, 1}}, object()

    assert _plain({"f": len, "h": Holder(), "n": (1, None)}) == {
        "f": "builtins.len",
        "h": [f"{__name__}.test_options_are_the_same_in_every_process.<locals>.Holder", {"path": {"b": ["1", "3"]}}],
        "n": [1, None],
    }


def test_what_cannot_be_replayed_is_refused(make, tmp_path):
    with pytest.raises(ConfigurationError, match="a cassette in a cassette"):
        make(make(Clock()))
    with pytest.raises(DataError, match=r"expected recorded calls of 'clock' at .*calls.sqlite, found no file"):
        make(Clock(), "replay").open(TASK)


def test_yaml_wraps_a_tool():
    parser = ArgumentParser()
    parser.add_argument("--tools", type=list[Tool])
    inner = {"class_path": "SearchTool", "init_args": {"top_k": 1}}
    given = {"class_path": "CassetteTool", "init_args": {"tool": inner, "path": "calls.sqlite", "mode": "replay"}}
    [tool] = parser.instantiate(parser.parse_object({"tools": [given]})).tools
    assert isinstance(tool.tool, SearchTool)
    assert (tool.name, tool.mode) == ("search", "replay")


class Learner(Clock):
    """Knows its schema only when it was asked."""

    def prepare(self):
        self.description, self.parameters = "Tells the time.", {"type": "object", "properties": {}}


def test_replay_shows_the_schema_that_was_learnt_while_recording(tmp_path):
    path = str(tmp_path / "cassette.sqlite")
    recorder = CassetteTool(Learner(), path)
    recorder.prepare()
    assert recorder.description == "Tells the time."
    answer = recorder.open(TASK).call("now")
    recorder.close()
    replay = CassetteTool(Learner(), path, mode="replay")
    replay.prepare()
    assert (replay.description, replay.schema) == ("Tells the time.", {"type": "object", "properties": {}})
    assert replay.open(TASK).call("now") == answer
    replay.close()
