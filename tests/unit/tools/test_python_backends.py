"""PythonTool in other places: the same tool over a container's streams, and over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools.backends.docker import DockerBackend
from appo_lightning.tools.backends.http import HTTPBackend
from appo_lightning.tools.backends.multiplexer import Multiplexer
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
from helpers.sandboxes import descendants, failure_of, wait_until

TASK = Task("task-0", [1], ("x",))
ENGINE = str(Path(__file__).parents[2] / "helpers" / "fake_engine.py")
TOKEN = "token-of-the-test"


@pytest.fixture(scope="module")
def service():
    """A real service in a process of its own; its address."""
    environment = {**os.environ, "APPO_SANDBOX_TOKEN": TOKEN}
    command = [sys.executable, "-m", "appo_lightning.tools.sandbox_server", "--port", "0", "--max-sessions", "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process.stdout.readline().split()[-1]
        started = descendants(process.pid)
        assert started
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.fixture
def backend(request, service, monkeypatch):
    monkeypatch.setenv("APPO_SANDBOX_TOKEN", TOKEN)
    return DockerBackend(engine=ENGINE) if request.param == "container" else HTTPBackend(service)


@pytest.fixture
def make_tool(make_tool, backend):
    return lambda **options: make_tool(**{"timeout_s": 20, **options}, backend=backend)


both = pytest.mark.parametrize("backend", ["container", "service"], indirect=True)


@both
def test_the_tool_behaves_as_on_this_machine(make_tool):
    tool = make_tool(max_output_chars=10)
    session, other = tool.open(TASK), tool.open(TASK)
    assert session.call("x = 5; print('wärme')") == "wärme"
    assert session.call("x") == "5"
    assert str(failure_of(other, "x")) == "NameError: name 'x' is not defined"
    assert str(failure_of(session, "print('before')\n1/0")) == "before\nZeroDivisionError: division by zero"
    assert session.call("'y' * 99") == "'yyyyyyyyy\n[output cut after 10 characters]"
    assert "invalid syntax" in str(failure_of(session, "x = "))
    assert session.call(f"len({'y' * 300_000!r})") == "300000"
    failure = failure_of(session, "import os; os._exit(3)")
    assert str(failure) == "The interpreter ended (exit code 3) and was restarted: its variables are lost."
    assert session.call("1 + 1") == "2"
    other.close()


@both
def test_a_call_that_takes_too_long_is_a_time_out(make_tool):
    session = make_tool(timeout_s=0.7).open(TASK)
    session.call("x = 1")
    failure = failure_of(session, "while True: pass")
    assert failure.kind == "timeout"
    assert (
        str(failure) == "TimeoutError: no result within 0.7 s. The interpreter was restarted: its variables are lost."
    )
    assert str(failure_of(session, "x")) == "NameError: name 'x' is not defined"


@both
def test_interrupt_and_close_end_a_running_call(make_tool):
    tool = make_tool()
    for end in ("interrupt", "close"):
        session = tool.open(TASK)
        threading.Timer(0.3, getattr(session, end)).start()
        started = time.monotonic()
        assert failure_of(session, "import time; time.sleep(15)").kind == "timeout"
        assert time.monotonic() - started < 5


@both
def test_many_sessions_run_side_by_side(make_tool):
    tool, wrong = make_tool(), []

    def work(number):
        session = tool.open(TASK)
        for turn in range(5):
            session.call(f"x = {number}; y = 'y' * 100_000")
            if session.call(f"x * 100 + {turn}, len(y)") != f"({number * 100 + turn}, 100000)":
                wrong.append(number)
        session.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@both
def test_the_protections_are_those_of_the_other_place(make_tool, capfd, backend):
    tool = make_tool()
    assert tool.protections().missing == ()
    where = "in a container of " if isinstance(backend, DockerBackend) else "at http://"
    assert capfd.readouterr().err.startswith(f"python tool: {where}")


@both
def test_options_of_the_local_sandbox_are_refused(backend):
    for option in ({"allow_unsafe": True}, {"warm_sessions": 1}):
        with pytest.raises(ConfigurationError, match="have no effect with backend") as caught:
            PythonTool(backend=backend, **option)
        assert ("backend.init_args.allow_unsafe" in str(caught.value)) == isinstance(backend, HTTPBackend)


@both
def test_a_flood_in_one_session_does_not_reach_the_others(make_tool):
    tool = make_tool(timeout_s=5)
    neighbour, flood = tool.open(TASK), tool.open(TASK)
    neighbour.call("x = 1")
    failure_of(flood, "import os\nos.set_blocking(3, True)\nwhile True: os.write(3, bytes(65536))")
    assert neighbour.call("x") == "1"
    assert flood.call("1 + 1") == "2"


# A container


def test_the_engine_is_told_to_shut_the_container_in():
    tool = PythonTool(memory_mb=512, preload=["fractions"], backend=DockerBackend(image="python:3.12", cpus=1.5))
    command = tool.backend.command(tool._server._needs, "name")
    shown = " ".join(command[:-1])
    for words in (
        "docker run --rm --interactive --init --name name",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--user 65534:65534",
        "--memory 8192m --memory-swap 8192m",
        "--cpus 1.5",
        "--pids-limit 1024",
        "--tmpfs /appo-scratch:rw,nosuid,nodev,mode=1777,size=1024m --env TMPDIR=/appo-scratch",
        "python:3.12 python3 -m appo_lightning.tools.backends.relay",
    ):
        assert words in shown
    assert "--privileged" not in shown
    mounts = [command[index + 1] for index, word in enumerate(command) if word == "--volume"]
    assert [mount.endswith("/appo_lightning:/opt/appo/appo_lightning:ro") for mount in mounts] == [True]
    options = json.loads(command[-1])
    assert (options["limits"]["memory_mb"], options["preload"]) == (512, ["fractions"])
    assert "--runtime runsc" in " ".join(DockerBackend(runtime="runsc").command(tool._server._needs, "name"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "no-such-engine"}, "expected the container engine 'no-such-engine' on this machine"),
        (
            {"engine": ENGINE, "image": "broken"},
            r"found that none started \(docker: Cannot connect .* running\?\); start",
        ),
        ({"engine": ENGINE, "image": "old"}, r"found that none started \(RuntimeError: this Python is too old\)"),
        ({"engine": "true"}, r"found that none started \(it said nothing\)"),
    ],
)
def test_a_container_that_does_not_start_stops_the_run_with_one_line(options, message):
    tool = PythonTool(backend=DockerBackend(**options))
    with pytest.raises(ConfigurationError, match=message) as caught:
        tool.open(TASK)
    assert "\n" not in str(caught.value)
    tool.close()


def test_a_module_that_the_image_lacks_stops_the_run():
    tool = PythonTool(preload=["no_such_module"], backend=DockerBackend(engine=ENGINE))
    with pytest.raises(ConfigurationError, match=r"cannot import 'no_such_module'"):
        tool.open(TASK)


def test_a_container_is_the_trainers_wall_and_what_its_sessions_lack_among_themselves_is_said(capfd):
    tool = PythonTool(backend=DockerBackend(engine=ENGINE, image="without-walls"))
    assert tool.open(TASK).call("1 + 1") == "2"
    said = capfd.readouterr().err
    assert said.startswith("python tool: in a container of ")
    assert "MISSING: no network, no files of others to read" in said
    tool.close()


def test_a_container_that_ends_is_replaced_and_closing_ends_everything():
    tool = PythonTool(backend=DockerBackend(engine=ENGINE))
    session = tool.open(TASK)
    session.call("x = 1")
    running = tool._server._running._process
    started = descendants(running.pid)
    running.kill()
    assert "lost" in str(failure_of(session, "x"))
    assert session.call("1 + 1") == "2"
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    second = tool._server._running._process
    started = descendants(second.pid)
    tool.close()
    assert second.poll() is not None
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def test_a_session_that_comes_after_the_end_of_the_stream_is_closed_at_once():
    stream, theirs = socket.socketpair()
    multiplexer = Multiplexer(theirs.fileno(), theirs.fileno())
    stream.close()
    multiplexer.run()
    assert multiplexer.ended
    ours, channel = socket.socketpair()
    multiplexer.add(channel)
    assert ours.recv(1) == b""


@pytest.mark.parametrize("option", [{"memory_mb": 0}, {"cpus": 0}, {"max_processes": 0}, {"tmp_mb": 0}])
def test_container_limits_out_of_range_are_refused(option):
    with pytest.raises(ConfigurationError, match=rf"^backend\.{next(iter(option))} must be"):
        DockerBackend(**option)


def test_a_container_smaller_than_a_session_is_refused():
    with pytest.raises(ConfigurationError, match=r"backend\.memory_mb must hold at least one session"):
        PythonTool(memory_mb=2048, backend=DockerBackend(memory_mb=1024))


# A service


def ask(service, method, path, content=None, token=TOKEN):
    request = urllib.request.Request(service + path, json.dumps(content or {}).encode(), method=method)
    request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


LIMITS = {"cpu_s": 5, "memory_mb": 256, "file_mb": 1, "scratch_mb": 8, "processes": 8, "output_bytes": 100}
WANTED = {"limits": LIMITS, "packages": False, "preload": []}


def test_the_protocol_is_as_described(service):
    status, opened = ask(service, "POST", "/sessions", WANTED)
    assert status == 200
    calls = f"/sessions/{opened['id']}/calls"
    asked = {"code": "print('a')\n1/0", "timeout_s": 5}
    status, answer = ask(service, "POST", calls, asked)
    assert (status, len(answer.pop("state"))) == (200, 16)
    assert answer == {"output": "a\n", "error": "ZeroDivisionError: division by zero", "ended": None}
    assert ask(service, "POST", calls, {"code": "'x' * 999", "timeout_s": 5})[1]["output"] == "'" + "x" * 99
    assert ask(service, "POST", calls, {"code": "while True: pass", "timeout_s": 0.5})[1]["ended"] == "time limit"
    assert ask(service, "POST", calls, asked) == (404, {"error": "no such session"})
    _, opened = ask(service, "POST", "/sessions", WANTED)
    path = f"/sessions/{opened['id']}"
    assert ask(service, "DELETE", path) == ask(service, "DELETE", path) == (200, {})
    assert ask(service, "POST", f"{path}/calls", asked)[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/nowhere", {}, 404),
        ("DELETE", "/sessions", {}, 404),
        ("POST", "/sessions", {}, 400),
        ("POST", "/sessions", [1], 400),
        ("POST", "/sessions", {**WANTED, "limits": {**LIMITS, "cpu_s": -1}}, 400),
        ("POST", "/sessions", {**WANTED, "limits": {**LIMITS, "more": 1}}, 400),
        ("POST", "/sessions/x/calls", {"code": "1"}, 400),
        ("POST", "/sessions/x/calls", {"code": "1", "timeout_s": 1e9}, 400),
        ("POST", "/sessions/../../etc/calls", {"code": "1", "timeout_s": 1}, 404),
        ("POST", "/protections", {**WANTED, "preload": ["no_such_module"]}, 500),
    ],
)
def test_requests_out_of_order_are_refused_with_a_reason(service, method, path, content, status):
    found, answer = ask(service, method, path, content)
    assert (found, bool(answer["error"])) == (status, True)


def test_the_service_asks_for_its_token(service, monkeypatch):
    assert ask(service, "POST", "/sessions", WANTED, token="wrong")[0] == 401
    monkeypatch.setenv("APPO_SANDBOX_TOKEN", "wrong")
    with pytest.raises(ConfigurationError, match=r"status 401, expected the token of \$APPO_SANDBOX_TOKEN"):
        PythonTool(backend=HTTPBackend(service)).open(TASK)


@pytest.fixture
def service_that_reports():
    """Starts a service of somebody else, which answers as it is told about its protections; its address."""
    started = []

    def start(**protections):
        answer = {
            "held": [],
            "missing": [],
            "walls": ["hope"],
            "children": True,
            "lacks": "",
            "where": "",
            **protections,
        }

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                body = json.dumps({"protections": answer}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("protections", "missing"),
    [
        ({"held": ["no privileges"], "missing": ["no network", "no files of others to read"]}, "no network, no files "),
        ({}, "everything, as nothing is held"),
    ],
)
def test_a_service_without_walls_is_refused_unless_allowed(service_that_reports, protections, missing, capfd):
    url = service_that_reports(**protections)
    tool = PythonTool(backend=HTTPBackend(url))
    for _ in range(2):  # also when it is asked again
        with pytest.raises(ConfigurationError, match=f"walls, found at {url} missing: {missing}") as caught:
            tool.open(TASK)
    assert "set backend.init_args.allow_unsafe: true" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    PythonTool(backend=HTTPBackend(url, allow_unsafe=True)).open(TASK)
    assert f"python tool: at {url}, tried and found to hold: " in capfd.readouterr().err


def test_a_service_that_may_run_without_walls_is_used_only_by_a_run_that_may_too(capfd):
    program = (
        "from appo_lightning.tools._sandbox.client import ForkServer; ForkServer.__init__.__kwdefaults__['walls'] = ();"
        "from appo_lightning.tools.sandbox_server import main; main()"
    )
    command = [sys.executable, "-c", program, "--port", "0", "--allow-unsafe"]
    environment = {name: value for name, value in os.environ.items() if name != "APPO_SANDBOX_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        url = process.stdout.readline().split()[-1]
        with pytest.raises(ConfigurationError, match="missing: no network, no files of others to read"):
            PythonTool(backend=HTTPBackend(url)).open(TASK)
        assert PythonTool(backend=HTTPBackend(url, allow_unsafe=True)).open(TASK).call("1 + 1") == "2"
        assert "MISSING: no network" in capfd.readouterr().err
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_service_bounds_its_sessions(service):
    opened = []
    while (answer := ask(service, "POST", "/sessions", WANTED))[0] == 200:
        opened.append(answer[1]["id"])
    assert answer == (503, {"error": "40 sessions are open"})
    for name in opened:
        ask(service, "DELETE", f"/sessions/{name}")
    status, last = ask(service, "POST", "/sessions", WANTED)
    ask(service, "DELETE", f"/sessions/{last['id']}")
    assert status == 200


def test_a_service_that_is_not_there_stops_the_run_with_one_line():
    tool = PythonTool(backend=HTTPBackend("http://127.0.0.1:9"))
    with pytest.raises(
        ConfigurationError, match=r"expected a sandbox service at http://127.0.0.1:9, found: "
    ) as caught:
        tool.open(TASK)
    assert "start one with python -m appo_lightning.tools.sandbox_server" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:80", "http://", "http://user:word@host", "http://host?token=word", "http://host?a=word"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigurationError, match=r"^backend\.url must") as caught:
        HTTPBackend(url)
    assert "word" not in str(caught.value).replace("password", "")


def test_a_service_for_other_machines_needs_a_token():
    environment = {name: value for name, value in os.environ.items() if name != "APPO_SANDBOX_TOKEN"}
    command = [sys.executable, "-m", "appo_lightning.tools.sandbox_server", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: expected a token in $APPO_SANDBOX_TOKEN to listen on 0.0.0.0, found none\n"
