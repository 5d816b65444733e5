"""A Python tool, a session of it, and tools with options of their own, for the tests of its interpreters."""

import pytest

from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task
from helpers.sandboxes import tool_with

TASK = Task("task-0", [1], ("x",))


@pytest.fixture(scope="module")
def tool():
    tool = PythonTool(timeout_s=20)
    yield tool
    tool.close()


@pytest.fixture
def session(tool):
    session = tool.open(TASK)
    yield session
    session.close()


@pytest.fixture
def make_tool():
    tools = []

    def make(walls=None, **options):
        tools.append(tool_with(walls, **options))
        return tools[-1]

    yield make
    for tool in tools:
        tool.close()
