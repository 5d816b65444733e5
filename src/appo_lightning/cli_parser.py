"""A parser whose errors are a few lines: what is wrong, what was probably meant, where to look."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from appo_lightning.registry import component_names

_UNKNOWN = re.compile(
    r"option '([\w.]+)'|unrecognized arguments: --?([\w.]+)|Option '([\w.]+)' is not accepted|"
    r"Key '([\w.]+)' is not expected|Group '[\w.]*' does not accept nested key '([\w.]+)'"
)


_UNION_NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "- Expected a <class 'str'>")


class ShortErrorParser(LightningArgumentParser):
    """``LightningArgumentParser`` without the page of usage before each error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Inner parsers raise, so that the outermost one can name the whole key.
        if not self.exit_on_error or os.environ.get("APPO_TRACEBACK"):
            super().error(message, ex)
        text = _without_noise(str(message))
        sys.stderr.write(f"error: {text}\n")
        hint = self._hint(text)
        if hint:
            sys.stderr.write(f"  did you mean: {hint}?\n")
        sys.stderr.write("  every option: appo fit --help\n")
        self.exit(2)
        raise AssertionError("unreachable")

    def _hint(self, text: str) -> str:
        match = _UNKNOWN.search(text)
        if match is None:
            return ", ".join(_near_class_names(text))
        unknown = next(group for group in match.groups() if group)
        known = _known_keys(self)
        leaf = unknown.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(unknown, known, 3, 0.75)
        near += [key for key in known if difflib.SequenceMatcher(None, leaf, key.rsplit(".", 1)[-1]).ratio() > 0.8]
        return ", ".join(dict.fromkeys(near[:4]))


def _near_class_names(text: str) -> list[str]:
    """Built-in classes whose name is nearly one of the words of an error."""
    known = component_names()
    words = {word for word in re.findall(r"\w{4,}", text) if word not in known}
    return [name for word in sorted(words) for name in difflib.get_close_matches(word, known, 1, 0.8)]


def _known_keys(parser: Any) -> set[str]:
    keys = {action.dest for action in parser._actions if isinstance(getattr(action, "dest", None), str)}
    subcommands = getattr(parser, "_subcommands_action", None)
    if subcommands is not None:
        for subparser in subcommands._name_parser_map.values():
            keys |= _known_keys(subparser)
    return keys


def _without_noise(message: str) -> str:
    """The message without jsonargparse's list of the other types that a value might have had."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_UNION_NOISE)]
    return "\n  ".join((telling or lines)[:8])
