"""PythonTool from start to end: interrupting, closing, killing, copying; many sessions; nothing stays behind."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
from helpers.sandboxes import (
    descendants,
    failure_of,
    is_running,
    server_directory,
    server_pid,
    wait_until,
)

TASK = Task("task-0", [1], ("x",))


@pytest.fixture(scope="module")
def bare_tool():
    """Keeps no session ready: every process belongs to a session of the test."""
    tool = PythonTool(timeout_s=20, warm_sessions=0)
    yield tool
    tool.close()


# Interrupting and closing


def test_interrupt_makes_a_running_call_return_at_once(session):
    session.call("x = 1")
    threading.Timer(0.3, session.interrupt).start()
    start = time.monotonic()
    failure = failure_of(session, "import time; time.sleep(15)")
    assert time.monotonic() - start < 5
    assert failure.kind == "timeout"
    assert "variables are lost" in str(failure)
    assert str(failure_of(session, "x")) == "NameError: name 'x' is not defined"


def test_interrupt_without_a_running_call_changes_nothing(session):
    session.call("x = 1")
    session.interrupt()
    assert session.call("x") == "1"


def test_close_ends_a_running_call_and_is_safe_to_repeat(tool):
    session = tool.open(TASK)
    threading.Timer(0.3, session.close).start()
    assert failure_of(session, "import time; time.sleep(15)").kind == "timeout"
    session.close()
    with pytest.raises(RuntimeError, match="closed session"):
        session.call("1")
    tool.open(TASK).close()  # never called: no process to end


@pytest.mark.parametrize(
    "start_child",
    [
        "import subprocess; child = subprocess.Popen(['sleep', '300']).pid",
        "import subprocess; child = subprocess.Popen(['sleep', '300'], start_new_session=True).pid",
        # A daemon: its parent ends, it leads a session of its own.
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "    os.execv('/bin/sleep', ['sleep', '300'])\nos.wait()",
    ],
    ids=["child", "new session", "daemon"],
)
@pytest.mark.parametrize("ending", ["close", "interrupt", "forgotten", "exit"])
def test_what_a_session_started_ends_with_it(bare_tool, start_child, ending):
    session = bare_tool.open(TASK)
    session.call("1")
    at_rest = descendants(server_pid(bare_tool))
    session.call(start_child)
    child = descendants(server_pid(bare_tool)) - at_rest
    assert len(child) == 1
    if ending == "close":
        session.close()
    elif ending == "interrupt":
        threading.Timer(0.2, session.interrupt).start()
        failure_of(session, "import time; time.sleep(15)")
    elif ending == "exit":
        failure_of(session, "import os; os._exit(0)")
    else:
        del session
        gc.collect()
    assert wait_until(lambda: not any(map(is_running, child)))


def test_closing_the_tool_ends_every_process_and_removes_every_file(make_tool):
    tool = make_tool()
    sessions = [tool.open(TASK) for _ in range(4)]
    for session in sessions:
        session.call("import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True); open('f', 'w')")
    server, directory = server_pid(tool), server_directory(tool)
    started = descendants(server)
    assert len(started) >= 4 * 3
    assert directory.is_dir()
    tool.close()
    tool.close()
    # At once, not some time later: the kernel ends a process namespace before its first process is gone.
    assert not any(is_running(pid) for pid in [server, *started])
    assert not directory.exists()


@pytest.mark.parametrize("walls", ["namespaces,landlock,seccomp", "landlock,seccomp"])
def test_nothing_outlives_a_trainer_that_is_killed(walls):
    program = (
        "import sys, time\nfrom appo_lightning.tools.python import PythonTool\nfrom appo_lightning.types import Task\n"
        f"tool = PythonTool()\ntool._server._walls = {walls.split(',')}\nsession = tool.open(Task('t', [1], ('x',)))\n"
        'try: session.call(\'import subprocess; subprocess.Popen(["sleep", "300"], start_new_session=True)\')\n'
        "except Exception: pass\n"
        "running = tool._server._running\n"
        "print(running._process.pid, running.stop.peek()[2][3], flush=True)\ntime.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as trainer:
        server, directory = trainer.stdout.readline().split()
        started = {int(server), *descendants(int(server))}
        assert len(started) > 2
        trainer.kill()
    assert wait_until(lambda: not any(map(is_running, started)))
    assert wait_until(lambda: not Path(directory).exists())


def test_a_closed_tool_starts_again_when_needed(make_tool):
    tool = make_tool()
    assert tool.open(TASK).call("1") == "1"
    tool.close()
    assert tool.open(TASK).call("2") == "2"


def test_nothing_is_started_before_the_first_session():
    tool = PythonTool()
    assert tool._server._running is None
    tool.close()


def test_a_copied_tool_has_a_server_of_its_own(make_tool):
    tool = make_tool(max_output_chars=5)
    tool.open(TASK).call("1")
    for twin in (copy.deepcopy(tool), pickle.loads(pickle.dumps(tool))):
        assert twin.open(TASK).call("'x' * 9") == "'xxxx\n[output cut after 5 characters]"
        assert server_pid(twin) != server_pid(tool)
        twin.close()


# Many


def test_many_threads_run_many_sessions(tool):
    wrong = []

    def work(number):
        try:
            for turn in range(3):
                session = tool.open(TASK)
                session.call(f"x = {number}")
                if session.call(f"x * 100 + {turn}") != str(number * 100 + turn):
                    wrong.append(number)
                session.close()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sessions_leave_no_process_and_no_file_behind(bare_tool):
    bare_tool.open(TASK).call("1")
    gc.collect()
    server = server_pid(bare_tool)
    assert wait_until(lambda: len(descendants(server)) == 1)
    at_rest = descendants(server)
    files_before = len(os.listdir("/proc/self/fd"))
    files_of_server = len(os.listdir(f"/proc/{min(at_rest)}/fd"))
    for _ in range(50):
        session = bare_tool.open(TASK)
        session.call("open('file', 'w').write('x')")
        session.close()
    assert wait_until(lambda: descendants(server) == at_rest)
    assert wait_until(lambda: len(os.listdir(f"/proc/{min(at_rest)}/fd")) <= files_of_server)
    assert len(os.listdir("/proc/self/fd")) <= files_before + 1


def test_sessions_are_ready_before_they_are_asked_for(make_tool):
    tool = make_tool(warm_sessions=3)
    tool.open(TASK)
    # The server in its process namespace, and two processes for each session.
    assert wait_until(lambda: len(descendants(server_pid(tool))) == 1 + 2 * 3)
    tool.open(TASK).call("1")
    assert wait_until(lambda: len(descendants(server_pid(tool))) == 1 + 2 * 3)


def test_a_server_that_is_killed_takes_its_sessions_along_and_the_next_ones_work(make_tool):
    tool = make_tool()
    first, second = tool.open(TASK), tool.open(TASK)
    for session in (first, second):
        session.call("import subprocess; x = subprocess.Popen(['sleep', '300'], start_new_session=True)")
    server = server_pid(tool)
    started = descendants(server)
    os.kill(server, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, started)))
    assert "variables are lost" in str(failure_of(first, "x"))
    assert first.call("1 + 1") == "2"
    assert server_pid(tool) != server
