"""CassetteTool: what was recorded is what is replayed, without the tool."""

import copy
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from appo_lightning.errors import ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.rollout.sessions import EpisodeSession
from appo_lightning.tools._options import plain
from appo_lightning.tools.base import StatelessTool, Tool, ToolSession
from appo_lightning.tools.cassette import CassetteTool
from appo_lightning.tools.recording import on_record
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


@pytest.fixture(params=["sqlite", "jsonl"])
def path(tmp_path, request):
    return str(tmp_path / f"calls.{request.param}")


@pytest.fixture
def make(path, request):
    def make_cassette(tool, mode="record"):
        cassette = CassetteTool(tool, path, mode)
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
    ("task", "argument"),
    [(TASK, "later"), (OTHER, "now"), (Task("task-0", [1], ("x",), {"documents": ["a"]}), "now")],
    ids=["argument", "task", "metadata"],
)
def test_a_call_that_was_not_recorded_stops_a_replay(make, task, argument):
    make(Clock("UTC")).open(TASK).call("now")
    with pytest.raises(ToolBroken, match=rf"holds no answer of 'clock' to '{argument}' in task {task.id}; the task or"):
        make(Clock("UTC"), "replay").open(task).call(argument)


# --- a recording is of one tool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "replay"])
def test_another_option_or_class_is_refused_by_its_name(make, mode):
    make(Clock("UTC")).open(TASK).call("now")
    with pytest.raises(
        DataError, match=r"recorded with another 'clock': its option zone differs; set it as it was, or"
    ):
        make(Clock("CET"), mode).open(TASK)
    with pytest.raises(DataError, match=r"another 'clock': it was test_cassette.Clock, now test_cassette.Gone;"):
        make(Gone("UTC"), mode).open(TASK)


def test_what_changes_no_answer_may_change(make, monkeypatch):
    answer = make(Clock()).open(TASK).call("now")
    tool = Clock()
    tool.timeout_s, tool.description = 60.0, "Tells the time."
    assert make(tool, "replay").open(TASK).call("now") == answer
    monkeypatch.setattr(Clock, "incidental", ("zone",))
    assert make(Clock("CET"), "replay").open(TASK).call("now") == answer


def test_an_option_that_came_later_may_have_its_default(make, monkeypatch):
    answer = make(Clock()).open(TASK).call("now")

    def with_more(self, zone="UTC", digits=2):
        self.zone, self.digits, self._calls = zone, digits, 0

    monkeypatch.setattr(Clock, "__init__", with_more)
    assert make(Clock(), "replay").open(TASK).call("now") == answer
    with pytest.raises(DataError, match="its option digits was not set"):
        make(Clock(digits=3), "replay").open(TASK)


def test_a_tool_that_was_not_recorded_is_missed_at_the_start(make):
    make(Clock()).open(TASK)
    with pytest.raises(
        DataError, match=r"replay: expected recorded calls of 'counter' in \S+, found none; record again"
    ):
        make(Counter(), "replay").open(TASK)


def test_a_recording_tells_no_option(make, path):
    make(Clock("sk-4711-secret")).open(TASK).call("now")
    found = b"".join(file.read_bytes() for file in Path(path).parent.iterdir())
    assert b"task-0 clock now" in found
    assert b"4711" not in found


# --- tools with state ------------------------------------------------------------------------------------------------


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

    assert plain({"f": len, "h": Holder(), "n": (1, None)}) == {
        "f": "builtins.len",
        "h": [f"{__name__}.test_options_are_the_same_in_every_process.<locals>.Holder", {"path": {"b": ["1", "3"]}}],
        "n": [1, None],
    }


def test_what_cannot_be_replayed_is_refused(make):
    with pytest.raises(ConfigurationError, match="a cassette in a cassette"):
        make(make(Clock()))
    with pytest.raises(DataError, match=r"expected recorded calls of 'clock' at .*calls.\w+, found no file"):
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


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_a_line_of_a_text_recording_says_what_was_asked_and_answered(tmp_path):
    path = tmp_path / "calls.jsonl"
    CassetteTool(Clock(), str(path)).open(TASK).call("now")
    about, call = map(json.loads, path.read_text().splitlines())
    assert (about["key"], set(about["answer"])) == ("tool/clock", {"class", "zone"})
    assert (call["query"], call["answer"]) == ("task-0 clock now", ["now 1", None])


def test_a_replay_only_reads(tmp_path):
    path = tmp_path / "calls.jsonl"
    answer = CassetteTool(Clock(), str(path)).open(TASK).call("now")
    before = path.read_bytes()
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    assert CassetteTool(Clock(), str(path), "replay").open(TASK).call("now") == answer
    assert path.read_bytes() == before
    tmp_path.chmod(0o755)


def test_half_a_line_is_no_answer_and_is_written_over(tmp_path):
    path = tmp_path / "calls.jsonl"
    CassetteTool(Clock(), str(path)).open(TASK).call("now")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ToolBroken, match="holds no answer"):
        CassetteTool(Clock(), str(path), "replay").open(TASK).call("now")
    CassetteTool(Clock(), str(path)).open(TASK).call("now")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', "\x00\xff"])
def test_a_file_that_is_no_recording_is_named_with_the_line(tmp_path, line):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"key": "a", "query": "", "answer": 1}\n' + line + "\n", encoding="latin-1")
    with pytest.raises(DataError, match=r'calls.jsonl:2: expected {"key": ..., "query": ..., "answer": ...}, found'):
        CassetteTool(Clock(), str(path)).open(TASK)


def test_a_file_of_another_kind_is_never_written_to(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "one line, without its end"}')
    with pytest.raises(
        DataError, match=r"mine.jsonl:1: expected .* found b'\{\"question\": \"one line.*'; name another"
    ):
        CassetteTool(Clock(), str(path)).open(TASK)
    assert path.read_text() == '{"question": "one line, without its end"}'


ADDS = """
import sys
from appo_lightning.tools._text_store import TextStore
store = TextStore(sys.argv[1])
print([store.put(f"key {n}", "", [sys.argv[2], "long " * 2000])[0] for n in range(50)])
"""


def test_processes_that_record_together_read_the_same_answers(tmp_path):
    path = str(tmp_path / "calls.jsonl")
    command = [sys.executable, "-c", ADDS, path]
    both = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "AB"]
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1] != ""
    assert len(Path(path).read_text().splitlines()) == 50


# --- all tools of a run ----------------------------------------------------------------------------------------------


def test_one_path_puts_every_tool_on_record():
    tools = [Clock(), Counter()]
    assert on_record(tools, record=None, replay=None) is tools
    for given, mode in (({"record": "a", "replay": None}, "record"), ({"record": None, "replay": "a"}, "replay")):
        wrapped = on_record(tools, **given)
        assert [(tape.tool, tape.path, tape.mode) for tape in wrapped] == [(tool, "a", mode) for tool in tools]


@pytest.mark.parametrize(
    ("tools", "record", "replay", "message"),
    [
        ([Clock()], "a", "b", "exclude each other"),
        ([], "a", None, "have no effect without data.tools"),
        ([Clock()], "", None, "want the path of a file, got an empty one"),
    ],
)
def test_recording_options_that_say_nothing_are_refused(tools, record, replay, message):
    with pytest.raises(ConfigurationError, match=message):
        on_record(tools, record=record, replay=replay)
