"""The options of a tool as facts that can be compared with those of another run, and that tell no secrets."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import Any

from appo_lightning.tools.base import Tool

# The last three are known only when a server runs, or only shown to the policy.
_NEVER_RECORDED = ("timeout_s", "description", "parameters", "text_argument")
_CLASS = "class"
_DEEPEST = 8  # nesting of options that is looked into


def option_digests(tool: Tool) -> dict[str, str]:
    """A digest of each option that may change an answer, and of the class: an option may hold a password."""
    left_out = (*_NEVER_RECORDED, *tool.incidental)
    options = {name: value for name, value in vars(tool).items() if name not in left_out and name[0] != "_"}
    return {_CLASS: kind_of(tool), **{name: _digest(value) for name, value in sorted(options.items())}}


def changed_option(tool: Tool, recorded: dict[str, str]) -> str:
    """What differs between a tool and the recorded one, in words; empty: nothing.

    An option that did not exist when the recording was made may have its default. One that does not exist any more, or
    no longer counts, is not looked at.
    """
    found = option_digests(tool)
    if found[_CLASS] != recorded.get(_CLASS):
        return f"it was {recorded.get(_CLASS)}, now {found[_CLASS]}"
    parameters = inspect.signature(type(tool)).parameters
    for name, digest in found.items():
        if name in recorded:
            if digest != recorded[name]:
                return f"its option {name} differs"
        elif name in parameters and digest != _digest(parameters[name].default):
            return f"its option {name} was not set"
    return ""


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON that is the same in every process: no representation that holds an address."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if depth == _DEEPEST:
        return kind_of(value)
    if isinstance(value, dict):
        return {str(key): plain(inner, depth + 1) for key, inner in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(plain(inner, depth + 1)) for inner in value)
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return [kind_of(value), plain(getattr(value, "__dict__", {}), depth + 1)]


def kind_of(value: Any) -> str:
    """The import path of its class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
