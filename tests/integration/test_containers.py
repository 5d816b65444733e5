"""The Python tool in containers of a real engine.

Needs an engine and an image with Python, which a fresh machine has not: the environment variable names them, as in
``APPO_TEST_CONTAINERS="docker=python:3.11-slim,podman=python:3.11-slim"``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from appo_lightning.errors import ToolFailure
from appo_lightning.tools.backends.docker import DockerBackend
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task

ENGINES = [pair.split("=", 1) for pair in os.environ.get("APPO_TEST_CONTAINERS", "").split(",") if pair]
TASK = Task("task", [1], ("answer",))

pytestmark = pytest.mark.skipif(not ENGINES, reason="APPO_TEST_CONTAINERS names no engine and image")


@pytest.fixture(scope="module", params=ENGINES or [("none", "none")], ids=lambda pair: pair[0])
def engine(request: pytest.FixtureRequest) -> tuple[str, str]:
    return tuple(request.param)


@pytest.fixture(scope="module")
def tool(engine):
    tool = PythonTool(
        timeout_s=3.0, memory_mb=256, packages=False, backend=DockerBackend(engine=engine[0], image=engine[1])
    )
    yield tool
    tool.close()


def test_variables_live_and_files_work(tool):
    session = tool.open(TASK)
    assert session.call("x = 2\nx + 1") == "3"
    assert session.call("open('notes', 'w').write('abc'); open('notes').read() + str(x)") == "'abc2'"
    session.close()


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
        "open('/anything', 'w')",
        "open('/etc/passwd').read()",
        "import os; os.listdir('..')",
        "while True: pass",
        "x = bytearray(1 << 30)",
    ],
)
def test_what_must_not_work_fails_and_the_next_call_works(tool, code):
    session = tool.open(TASK)
    with pytest.raises(ToolFailure):
        session.call(code)
    assert session.call("1 + 1") == "2"
    session.close()


def test_sessions_do_not_see_each_other(tool):
    one, other = tool.open(TASK), tool.open(TASK)
    place = one.call("import os; open('secret', 'w').write('s'); os.getcwd()").strip("'")
    assert other.call("import os; os.listdir('.')") == "[]"
    with pytest.raises(ToolFailure):
        other.call(f"open({place + '/secret'!r}).read()")
    one.close()
    other.close()


def test_the_container_ends_with_a_trainer_that_is_killed(engine):
    program = f"""
import os, signal
from appo_lightning.tools.backends.docker import DockerBackend
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
tool = PythonTool(memory_mb=256, packages=False, backend=DockerBackend(engine={engine[0]!r}, image={engine[1]!r}))
session = tool.open(Task("task", [1], ("answer",)))
print(session.call("1 + 1"), tool._server._running.stop.peek()[2][-1], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    answer, name = done.stdout.split()
    assert answer == "2"
    deadline = time.monotonic() + 20
    while name in subprocess.run([engine[0], "ps", "-a"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline, f"{name} still runs"
        time.sleep(0.2)
