"""MCPTool against a real server, started by the tool or reached over HTTP."""

import copy
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from appo_lightning.errors import ConfigurationError, ToolBroken, ToolFailure
from appo_lightning.rollout.sessions import EpisodeSession
from appo_lightning.tools.base import Tool
from appo_lightning.tools.mcp import MCPServer, MCPTool
from appo_lightning.types import Task, ToolCall

pytest.importorskip("mcp", reason="an optional extra: pip install 'appo-lightning[mcp]'")

SERVER_FILE = Path(__file__).parents[2] / "helpers" / "mcp_server.py"
SERVER = MCPServer(command=(sys.executable, str(SERVER_FILE)), environment=("TEST_MCP_KEY",))
OTHER_SERVER = MCPServer(command=SERVER.command)  # not the same: it gets no key
TASK = Task("task-0", [1], ("x",))
KEY = "k-4711-secret"


@pytest.fixture(scope="module", autouse=True)
def running_server():
    """Kept for all tests: starting one takes most of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_MCP_KEY", KEY)
        tool = MCPTool(SERVER, "process")
        tool.open(TASK)
        yield
        tool.close()


@pytest.fixture
def make(request):
    """Tools that are closed after the test."""

    def make_tool(*args, server=SERVER, **kwargs):
        tool = MCPTool(server, *args, **kwargs)
        request.addfinalizer(tool.close)
        return tool

    return make_tool


@contextmanager
def http_server(port):
    with subprocess.Popen([sys.executable, str(SERVER_FILE), str(port)], stderr=subprocess.DEVNULL) as process:
        for _ in range(400):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(tool, argument):
    return tool.open(TASK).call(argument)


def process_is_gone(number, within=5.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_tools_of_one_server_share_its_process_and_describe_themselves(make):
    add, echo = make("add", server=OTHER_SERVER), make("echo", server=OTHER_SERVER)
    process, other = make("process", server=OTHER_SERVER), make("process", server=OTHER_SERVER, name="other")
    assert ask(add, '{"a": 20, "b": 22}') == "42"
    assert ask(add, '{"a": 1}') == "2"
    assert (add.description, add.parameters["required"]) == ("Adds two numbers.", ["a"])
    # One text parameter: the text between the tags.
    assert ask(echo, 'say "hi" {}') == 'say "hi" {}'
    assert echo.parameters is None
    number = ask(process, "")
    assert ask(other, "") == number
    for tool in (add, echo, process):
        tool.close()
    assert ask(other, "") == number
    other.close()
    assert process_is_gone(int(number))
    assert ask(other, "") != number  # after another start; closed by the fixture


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("20 22", "expected a JSON object, found text that is not JSON"),
        ("[1]", r"expected a JSON object, found \[1\]"),
        ('{"b": 2}', "'a' is a required property; expected a JSON object: a .integer., b .integer, optional."),
        ('{"a": "x"}', "a: 'x' is not of type 'integer'; expected"),
    ],
)
def test_a_malformed_call_is_told_what_was_wrong(make, argument, message):
    with pytest.raises(ToolFailure, match=message) as caught:
        ask(make("add"), argument)
    assert caught.value.kind == "malformed"


def test_what_the_server_refuses_is_told_to_the_policy(make):
    with pytest.raises(ToolFailure, match="no more tea") as caught:
        ask(make("fail"), "no more tea")
    assert caught.value.kind == "error"


def test_a_call_that_takes_too_long_times_out_and_leaves_the_connection_to_others(make):
    nap, echo = make("nap", timeout_s=0.3), make("echo")
    started = time.monotonic()
    with pytest.raises(ToolFailure, match=r"no answer within 0.3 seconds") as caught:
        ask(nap, '{"seconds": 1}')
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 0.9
    assert ask(echo, "still there") == "still there"


def test_an_interrupted_call_returns_soon(make):
    session = make("nap").open(TASK)
    threading.Timer(0.2, session.interrupt).start()
    started = time.monotonic()
    with pytest.raises(ToolFailure, match="stopped before it finished"):
        session.call('{"seconds": 1}')
    assert time.monotonic() - started < 0.9


def test_many_threads_share_one_connection(make):
    add, wrong = make("add"), []

    def work(number):
        wrong.extend(turn for turn in range(10) if ask(add, f'{{"a": {number}, "b": {turn}}}') != str(number + turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_server_that_dies_fails_its_call_and_is_started_again(make):
    die, process = make("die"), make("process")
    number = ask(process, "")
    with (
        pytest.warns(UserWarning, match=r"MCP server .* has ended; it said last: .*my key was \*\*\*"),
        pytest.raises(ToolFailure, match=r"^the server has ended. It is started again for the next call.$") as caught,
    ):
        ask(die, '{"after": 0}')
    assert KEY not in str(caught.value)
    assert ask(process, "") != number


def test_a_server_that_can_no_longer_be_started_stops_the_run(make, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER_FILE.read_text())
    die = make("die", server=MCPServer(command=(sys.executable, str(script))))
    session = die.open(TASK)
    script.write_text("raise SystemExit('no licence')")
    with pytest.warns(UserWarning, match="has ended"), pytest.raises(ToolFailure, match="has ended"):
        session.call('{"after": 0}')
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="expected a server that starts, found .*; it said last: no licence"),
            pytest.raises(ToolFailure, match="the server has ended and did not start"),
        ):
            session.call('{"after": 0}')
    with pytest.raises(ToolBroken, match=r"expected a server that starts, found .*; it said last: no licence"):
        session.call('{"after": 0}')


def test_a_server_gets_only_the_environment_that_is_named(make, monkeypatch):
    monkeypatch.setenv("TRAINER_SECRET", "x")
    assert ask(make("environment"), "TEST_MCP_KEY") == KEY
    other = make("environment", server=OTHER_SERVER)
    assert [ask(other, name) for name in ("TEST_MCP_KEY", "TRAINER_SECRET")] == ["not set", "not set"]


def test_a_stateful_tool_gives_each_trajectory_a_server_of_its_own(make):
    notes = make(name="notes", stateful=True)
    first, second = notes.open(TASK), notes.open(TASK)
    assert first.call('{"tool": "note", "arguments": {"text": "a"}}') == "a"
    assert first.call('{"tool": "note", "arguments": {"text": "b"}}') == "a,b"
    assert second.call('{"tool": "note", "arguments": {"text": "c"}}') == "c"
    number = int(first.call('{"tool": "process"}'))
    first.close()
    assert process_is_gone(number)
    assert second.call('{"tool": "forget"}') == ""
    second.close()


def test_a_branch_repeats_the_calls_of_its_prefix(make):
    said = '{"tool": "note", "arguments": {"text": "%s"}}'
    prefix = [ToolCall("notes", said % text, "", 0, 0, succeeded=True, seconds=0.0) for text in ("a", "b")]
    branch = EpisodeSession(make(name="notes", stateful=True), TASK, prefix)
    assert branch.call(said % "c") == "a,b,c"
    branch.close()


def test_all_tools_under_one_tag_are_checked_too(make):
    everything = make(name="server")
    assert ask(everything, '{"tool": "add", "arguments": {"a": 1}}') == "2"
    assert "add: Adds two numbers." in everything.description
    for argument, message in (
        ('{"tool": "nix"}', "tool: 'nix' is not one of"),
        ('{"tool": "add", "arguments": {"a": "x"}}', "a: 'x' is not of type 'integer'"),
        ('{"arguments": {}}', "'tool' is a required property"),
    ):
        with pytest.raises(ToolFailure, match=message):
            ask(everything, argument)


def test_a_server_over_http_that_goes_away_and_comes_back(make, port):
    headers = {"Authorization": "TEST_MCP_KEY"}
    with http_server(port) as url:
        header = make("header", server=MCPServer(url=url, headers=headers))
        assert ask(header, "Authorization") == KEY
        add = make("add", server=MCPServer(url=url))
        nap = make("nap", server=MCPServer(url=url), timeout_s=0.2)
        assert ask(add, '{"a": 20, "b": 22}') == "42"
        with pytest.raises(ToolFailure, match="no answer within") as caught:
            ask(nap, '{"seconds": 1}')
        assert caught.value.kind == "timeout"
        session = add.open(TASK)
        assert session.call('{"a": 1}') == "2"
    with pytest.warns(UserWarning, match="has ended"), pytest.raises(ToolFailure, match="the server has ended"):
        session.call('{"a": 1}')
    with http_server(port):
        assert session.call('{"a": 1}') == "2"


def test_a_server_over_http_that_is_not_there(make):
    tool = make("add", server=MCPServer(url="http://127.0.0.1:9/mcp", start_timeout_s=5))
    with pytest.raises(ToolBroken, match=r"MCP server 'http://127.0.0.1:9/mcp': expected a server that starts, found"):
        tool.open(TASK)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("/nowhere/server",), "expected a server that starts, found FileNotFoundError"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "no answer within 0.5 s"),
        ((sys.executable, "-c", "raise SystemExit('bad config')"), "it said last: bad config"),
    ],
)
def test_a_server_that_does_not_start_stops_the_run_with_a_line(make, command, message):
    with pytest.raises(ToolBroken, match=message) as caught:
        make("add", server=MCPServer(command=command, start_timeout_s=0.5 if "sleep" in command[-1] else 10)).open(TASK)
    assert "\n" not in str(caught.value)


def test_an_unknown_tool_names_those_that_exist(make):
    with pytest.raises(ConfigurationError, match=r"expected a tool 'sub', found add, die, echo, .*; set tool"):
        make("sub").open(TASK)


def test_a_missing_environment_variable_is_named(make, monkeypatch):
    monkeypatch.delenv("TEST_MCP_KEY")
    server = MCPServer(command=("python",), environment=("TEST_MCP_KEY",))
    with pytest.raises(ConfigurationError, match="expected the environment variables TEST_MCP_KEY, found none"):
        make("add", server=server).open(TASK)


def test_a_header_that_cannot_be_sent_is_refused_and_not_shown(make, monkeypatch):
    monkeypatch.setenv("BROKEN_KEY", f"{KEY}\nmore")
    server = MCPServer(url="http://127.0.0.1:9/mcp", headers={"Authorization": "BROKEN_KEY"})
    with pytest.raises(ConfigurationError, match="the environment variable BROKEN_KEY holds what no header") as caught:
        make("add", server=server).open(TASK)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must have a command or a url, and not both"),
        ({"command": ("a",), "url": "http://b"}, "must have a command or a url, and not both"),
        ({"command": ("a",), "headers": {"A": "B"}}, "server.headers are for a url"),
        ({"url": "http://b", "environment": ("A",)}, "server.environment and cwd are for a command"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        MCPServer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": f"https://user:{KEY}@host/mcp"}, "server.url must hold no user and no password: name its environment"),
        ({"url": f"https://host/mcp?tavilyApiKey={KEY}"}, "server.url must not hold the value of 'tavilyApiKey': name"),
        (
            {"url": "https://host/mcp", "headers": {"Authorization": f"Bearer {KEY}"}},
            "server.headers.Authorization must",
        ),
        ({"command": ("a",), "environment": (f"SOME_KEY={KEY}",)}, "server.environment must hold NAMES"),
        ({"command": ("a",), "url": f"https://host/mcp?user={KEY}"}, "server must have a command or a url"),
        ({"url": "host/mcp"}, "server.url must begin with http"),
    ],
)
def test_a_key_written_down_is_refused_and_not_repeated(options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        MCPServer(**options)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_leave_out_what_stands_behind_an_address(make):
    server = MCPServer(url=f"http://127.0.0.1:9/mcp?tenant={KEY}", start_timeout_s=5)
    assert str(server) == "MCP server 'http://127.0.0.1:9/mcp'"
    with pytest.raises(ToolBroken, match="expected a server that starts") as caught:
        make("add", server=server).open(TASK)
    assert KEY not in str(caught.value)


def test_a_copied_tool_still_answers(make, request):
    twin = copy.deepcopy(make("add"))
    request.addfinalizer(twin.close)
    assert ask(twin, '{"a": 1}') == "2"


def test_yaml_describes_the_server():
    parser = ArgumentParser()
    parser.add_argument("--tools", type=list[Tool])
    given = {"server": {"command": ["python", "server.py"], "environment": ["SOME_KEY"]}, "tool": "add"}
    config = parser.parse_object({"tools": [{"class_path": "MCPTool", "init_args": given}]})
    [tool] = parser.instantiate(config).tools
    assert tool.server == MCPServer(command=("python", "server.py"), environment=("SOME_KEY",))
    assert hash(tool.server) == hash(MCPServer(command=("python", "server.py"), environment=("SOME_KEY",)))
