"""What a search provider wants to be asked and how it answers, as a few lines of configuration."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.parse import quote

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._secrets import check_address, check_variable, names_a_secret

_HIGHLIGHT = re.compile(r"</?(?:b|strong|em|i|mark)>")
_REMEDY = "write {key} in provider.params, headers or body, and name the environment variable in provider.key"


@dataclass(frozen=True)
class SearchProvider:
    """An HTTP search service that answers with JSON.

    In ``url``, ``params``, ``headers`` and ``body``, ``{query}``, ``{count}`` and ``{key}`` stand for the query, the
    number of results and the key.

    Args:
        url: address of the service, without parameters.
        method: of the request.
        params: of the address, after ``?``.
        headers: of the request.
        body: JSON body; only with POST.
        key: NAME of the environment variable that holds the key, never the key itself; null: the service needs none.
        results: where the list of results is in the answer, names joined by dots.
        title: field of a result, names joined by dots.
        text: likewise.
    """

    url: str
    method: Literal["GET", "POST"] = "GET"
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    results: str = "results"
    title: str = "title"
    text: str = "content"

    def __post_init__(self) -> None:
        if self.key is not None:
            check_variable(self.key, "provider.key")
        check_address(self.url, "provider.url", _REMEDY)
        if "?" in self.url:
            raise ConfigurationError(
                "provider.url must end before its '?': put what stands behind into provider.params"
            )
        for option in ("params", "headers", "body"):
            for place in _literal_keys(getattr(self, option), f"provider.{option}"):
                raise ConfigurationError(f"{place} must not hold a key itself: {_REMEDY}")
        said = json.dumps([self.url, self.params, self.headers, self.body])
        if "{query}" not in said:
            raise ConfigurationError("provider: expected {query} in url, params or body, found it nowhere; add it")
        if ("{key}" in said) != (self.key is not None):
            raise ConfigurationError(
                "provider.key and {key} belong together: name the variable, and say where the key goes"
            )
        if self.body and self.method == "GET":
            raise ConfigurationError("provider.body has no effect with GET; use method: POST, or params")

    @property
    def fingerprint(self) -> str:
        """Equal for providers that give the same answers; holds no key."""
        said = {name: value for name, value in asdict(self).items() if name != "key"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def secret(self) -> str:
        """The key; empty without one.

        Raises:
            ConfigurationError: the environment variable is not set.
        """
        if self.key is None:
            return ""
        value = os.environ.get(self.key, "").strip()
        if not value:
            raise ConfigurationError(f"expected a key in the environment variable {self.key}, found none; set it")
        if not (value.isascii() and value.isprintable()):
            raise ConfigurationError(f"the environment variable {self.key} holds characters that no key has; mend it")
        return value

    def request(self, query: str, count: int) -> dict[str, Any]:
        """The request, as arguments for an HTTP client."""
        secret = self.secret()

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: filled(inner) for name, inner in value.items()}
            if isinstance(value, list):
                return [filled(inner) for inner in value]
            if value == "{count}":
                return count
            if not isinstance(value, str):
                return value
            # The query last: nothing that it says is filled in.
            return value.replace("{key}", secret).replace("{count}", str(count)).replace("{query}", query)

        address = self.url.replace("{key}", quote(secret, safe="")).replace("{count}", str(count))
        address = address.replace("{query}", quote(query, safe=""))
        request: dict[str, Any] = {"method": self.method, "url": address}
        request["params"] = {name: str(value) for name, value in filled(self.params).items()}
        request["headers"] = {name: str(value) for name, value in filled(self.headers).items()}
        if self.body:
            request["json"] = filled(self.body)
        return request

    def read(self, answer: Any) -> list[list[str]] | None:
        """Title and text of each result; None if the answer has no list where ``results`` says."""
        results = _at(answer, self.results)
        if not isinstance(results, list):
            return None
        found = [[_plain(_at(result, self.title)), _plain(_at(result, self.text))] for result in results]
        return [[title, text] for title, text in found if title or text]


def _literal_keys(value: Any, place: str, *, secret: bool = False) -> Iterator[str]:
    """Where a text stands under a name like ``Authorization`` that is not filled in from the environment."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _literal_keys(inner, f"{place}.{name}", secret=secret or names_a_secret(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _literal_keys(inner, place, secret=secret)
    elif secret and isinstance(value, str) and value and "{key}" not in value:
        yield place


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _plain(value: Any) -> str:
    """A text without highlighting, on one line."""
    return " ".join(html.unescape(_HIGHLIGHT.sub("", value)).split()) if isinstance(value, str) else ""
