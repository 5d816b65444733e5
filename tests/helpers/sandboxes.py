"""What tests see of a Python tool from outside: its processes, its directory, a tool with only some walls."""

import time
from pathlib import Path

import pytest

from appo_lightning.errors import ToolFailure
from appo_lightning.tools.python import PythonTool

# What machines offer: everything; a container or a system that keeps namespaces from users.
WALLS = {"namespaces": ("namespaces", "landlock", "seccomp"), "landlock": ("landlock", "seccomp")}


def tool_with(walls, **options):
    """A tool that uses only these walls of the machine; None: all that it has."""
    tool = PythonTool(**options)
    if walls is not None:
        tool._server._walls = tuple(walls)
    return tool


def server_pid(tool):
    return tool._server._running._process.pid


def server_directory(tool):
    return Path(tool._server._running.stop.peek()[2][3])


def descendants(pid):
    """Process ids of everything that a process started, directly or not, and that is no zombie."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def failure_of(session, code):
    with pytest.raises(ToolFailure) as caught:
        session.call(code)
    return caught.value


def wait_until(condition, seconds=60.0):
    """Whether it comes true; a busy machine may take its time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
