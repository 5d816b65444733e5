"""A Python function as a tool: its type hints become the schema that a call is checked against."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic_core import to_json

from appo_lightning.errors import ConfigurationError, ToolFailure
from appo_lightning.tools.base import StatelessTool, Tool, check_tool_name
from appo_lightning.types import Task


class FunctionTool(StatelessTool):
    """Call a function: ``<name>{"city": "Lund", "days": 3}</name>``.

    The function's type hints and docstring give the schema. A call that does not fit is answered with what was wrong.
    A function whose one parameter is a ``str`` gets the text between the tags as it is, without JSON. A parameter
    annotated ``Task`` gets the trajectory's task, and is no part of the schema.

    The result is shown as it is if it is a ``str``, as JSON otherwise; ``None`` is an empty result. It should depend on
    the arguments and the task only. Calls of different trajectories run in parallel threads.

    Args:
        function: a function with type hints, in YAML by its import path: ``my_module.my_function``.
        name: the tag; null takes the function's name.
        description: null takes the docstring's first sentence or paragraph.
        timeout_s: wall-clock limit of one call, seconds. Python cannot stop a thread: one that hangs goes on beside the
            run.

    Raises:
        ConfigurationError: the function has a parameter without a type hint, or of a kind that JSON cannot name.
    """

    def __init__(
        self,
        function: Callable,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        if not inspect.isroutine(function) or inspect.iscoroutinefunction(function):
            raise ConfigurationError(f"function must be a plain function, got {function!r}; wrap it in one")
        if not timeout_s > 0:
            raise ConfigurationError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        self.function = function
        documentation = docstring_parser.parse(inspect.getdoc(function) or "")
        self.name = check_tool_name(function.__name__ if name is None else name)
        self.description = (documentation.short_description or "") if description is None else description
        self.timeout_s = timeout_s
        self._prepare()

    def run(self, argument: str, task: Task) -> str:
        arguments: dict[str, Any] = {self._text: argument} if self._text is not None else self._parsed(argument)
        if self._task is not None:
            arguments[self._task] = task
        result = self.function(**arguments)
        if result is None:
            return ""
        return result if isinstance(result, str) else to_json(result, fallback=str).decode()

    def _parsed(self, argument: str) -> dict[str, Any]:
        try:
            # A call without arguments may leave the braces out.
            values = self._model.model_validate_json(argument or "{}")
        except ValidationError as error:
            raise ToolFailure(f"{_what_is_wrong(error)}; expected {self._expected}", "malformed") from None
        # Those left out keep the function's own defaults.
        return {_parameter_of(self._model, field): getattr(values, field) for field in values.model_fields_set}

    def _prepare(self) -> None:
        self._model, self._task = _arguments_of(self.function)
        schema = self._model.model_json_schema()
        fields = list(self._model.model_fields.values())
        single = len(fields) == 1 and fields[0].annotation is str
        self._text = fields[0].alias if single else None
        self.text_argument = self._text or Tool.text_argument
        self.parameters = None if single else schema
        self._expected = "a JSON object: " + ", ".join(
            f"{name} ({_type_of(entry)}{'' if name in schema.get('required', ()) else ', optional'})"
            for name, entry in schema["properties"].items()
        )

    def __getstate__(self) -> dict[str, Any]:
        # The model is a class of its own, which pickle could not find again.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()


def _arguments_of(function: Callable) -> tuple[type[BaseModel], str | None]:
    """What a call must give, and the name of the parameter that takes the task."""
    try:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{_name(function)}: its type hints cannot be read: {error}") from error
    documented = {entry.arg_name: entry.description for entry in _documented_parameters(function)}
    fields: dict[str, Any] = {}
    task: str | None = None
    for name, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigurationError(f"{_name(function)}: its parameter {parameter} has no name in a call; name each")
        if name not in hints:
            raise ConfigurationError(f"{_name(function)}: its parameter {name!r} has no type hint; add one")
        if hints[name] is Task:
            task = name
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        # Names of their own: a parameter may be called as a method of pydantic's models is, "json" or "copy".
        fields[f"field_{len(fields)}"] = (
            hints[name],
            Field(default, alias=name, title=name, description=documented.get(name)),
        )
    try:
        model = create_model(_name(function), __config__=ConfigDict(extra="forbid"), **fields)
        model.model_json_schema()
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{_name(function)}: its type hints have no JSON schema: {reason}") from error
    return model, task


def _documented_parameters(function: Callable) -> list[docstring_parser.DocstringParam]:
    return docstring_parser.parse(inspect.getdoc(function) or "").params


def _parameter_of(model: type[BaseModel], field: str) -> str:
    alias = model.model_fields[field].alias
    assert alias is not None
    return alias


def _what_is_wrong(error: ValidationError) -> str:
    """Each mistake in a few words."""
    mistakes = []
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(str(part) for part in mistake["loc"])
        mistakes.append(f"{place}: {mistake['msg']}" if place else mistake["msg"])
    return "; ".join(mistakes)


def _type_of(schema: dict[str, Any]) -> str:
    """The type in a word; a policy reads it."""
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " or ".join(_type_of(option) for option in schema["anyOf"])
    return schema.get("type", "object")


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", repr(function))
