"""FunctionTool: type hints make the schema, calls that do not fit it never reach the function."""

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from jsonargparse import ArgumentParser
from pydantic import Field

from appo_lightning.errors import ConfigurationError, ToolFailure
from appo_lightning.rollout.toolpool import ToolPool
from appo_lightning.tools.base import Tool
from appo_lightning.tools.function import FunctionTool
from appo_lightning.types import Task

TASK = Task("task-0", [1], ("x",), {"city": "Lund"})


def forecast(city: str, days: Annotated[int, Field(ge=1, le=7)] = 3, unit: Literal["C", "F"] = "C") -> list[str]:
    """Forecasts the weather.

    Longer text that is no part of the description.

    Args:
        city: where.
        days: how far.
    """
    return [f"{city} {day} {unit}" for day in range(days)]


def shout(text: str) -> str:
    return text.upper()


def home(task: Task, suffix: str) -> str:
    return task.metadata["city"] + suffix


def now() -> int:
    return 7


@dataclass
class Point:
    x: int
    y: int


def mirrored(json: Point, copy: bool) -> Point:
    return Point(json.y, json.x) if copy else json


def broken(number: int) -> int:
    return 1 // number


def test_name_description_and_schema_come_from_the_function():
    tool = FunctionTool(forecast)
    assert (tool.name, tool.description) == ("forecast", "Forecasts the weather.")
    schema = tool.parameters
    assert schema["required"] == ["city"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["city"] == {"type": "string", "title": "city", "description": "where."}
    assert schema["properties"]["days"]["maximum"] == 7
    assert schema["properties"]["unit"] == {"default": "C", "enum": ["C", "F"], "title": "unit", "type": "string"}


def test_a_call_is_a_json_object_and_defaults_stay():
    tool = FunctionTool(forecast, name="weather")
    assert tool.run('{"city": "Lund", "days": 2}', TASK) == '["Lund 0 C","Lund 1 C"]'


def test_one_text_argument_is_the_text_itself():
    tool = FunctionTool(shout)
    assert tool.parameters is None
    assert tool.run('{"text": "a"}', TASK) == '{"TEXT": "A"}'
    assert tool.schema == {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def test_a_task_is_given_and_not_asked_for():
    tool = FunctionTool(home)
    assert tool.parameters is None  # one text remains
    assert tool.run("!", TASK) == "Lund!"


@pytest.mark.parametrize("argument", ["", "{}"])
def test_a_function_without_parameters_is_called_with_nothing(argument):
    assert FunctionTool(now).run(argument, TASK) == "7"


def test_arguments_and_results_may_be_structures_and_have_any_name():
    tool = FunctionTool(mirrored)
    assert json.loads(tool.run('{"json": {"x": 1, "y": 2}, "copy": true}', TASK)) == {"x": 2, "y": 1}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("Lund", "Invalid JSON: .*; expected a JSON object: city .string., days .integer, optional., unit"),
        ("[]", "Input should be an object; expected a JSON object"),
        ("{}", "city: Field required; expected"),
        ('{"city": "Lund", "days": 8}', "days: Input should be less than or equal to 7; expected"),
        ('{"city": "Lund", "unit": "K"}', "unit: Input should be 'C' or 'F'; .*unit .'C' or 'F', optional"),
        ('{"city": "Lund", "hours": 8}', "hours: Extra inputs are not permitted"),
        ('{"city": "\ud800"}', "unable to parse raw data as a unicode string; expected"),
    ],
)
def test_a_call_that_does_not_fit_is_told_what_was_wrong(argument, message):
    with pytest.raises(ToolFailure, match=message) as caught:
        FunctionTool(forecast).run(argument, TASK)
    assert caught.value.kind == "malformed"
    assert "\n" not in str(caught.value)


def test_what_the_function_raises_is_told_to_the_policy():
    pool, session = ToolPool(1), FunctionTool(broken).open(TASK)
    pool.submit("a", lambda: session.call('{"number": 0}'), interrupt=session.interrupt, timeout_s=5)
    [outcome] = pool.poll(wait_s=20)
    pool.abandon()
    assert outcome.failure.kind == "error"
    assert outcome.text == "ZeroDivisionError: integer division or modulo by zero"


def untyped(city):
    return city


def many(*cities: str):
    return cities


def by_position(city: str, /):
    return city


async def later(city: str):
    return city


def unknown(city: "Nowhere"):  # noqa: F821
    return city


def opaque(city: object.__class__, thing: ToolPool):
    return city


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (untyped, "untyped: its parameter 'city' has no type hint; add one"),
        (many, r"its parameter \*cities: str has no name in a call"),
        (by_position, "its parameter city: str has no name in a call"),
        (later, "must be a plain function, got <function later"),
        (Point, "must be a plain function, got <class"),
        (unknown, "its type hints cannot be read: name 'Nowhere' is not defined"),
        (opaque, "its type hints have no JSON schema"),
    ],
)
def test_functions_that_cannot_be_tools_are_refused(function, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        FunctionTool(function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["result", "two words", "", "a>"])
def test_a_name_that_cannot_be_a_tag_is_refused(name):
    with pytest.raises(ConfigurationError, match="a tool's name is its tag"):
        FunctionTool(shout, name=name)


def test_a_copied_tool_still_answers():
    tool = FunctionTool(forecast)
    for twin in (copy.deepcopy(tool), pickle.loads(pickle.dumps(tool))):
        assert twin.run('{"city": "Lund", "days": 1}', TASK) == '["Lund 0 C"]'
        assert twin.parameters == tool.parameters


def test_yaml_names_the_function_by_its_import_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "docs" / "examples")
    parser = ArgumentParser()
    parser.add_argument("--tools", type=list[Tool])
    given = [{"class_path": "FunctionTool", "init_args": {"function": "convert_tool.convert", "timeout_s": 2.0}}]
    config = parser.parse_object({"tools": given})
    assert "function: convert_tool.convert" in parser.dump(config)
    [tool] = parser.instantiate(config).tools
    assert (tool.name, tool.timeout_s) == ("convert", 2.0)
    assert tool.run('{"length": 2, "unit": "km"}', TASK) == "2000.0"
