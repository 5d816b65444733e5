"""Keys stand in the environment, and a configuration names the variable: what refuses keys that are written down."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from appo_lightning.errors import ConfigurationError

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_ADDRESS = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[^/?#\s@:\[\]]+)(?::\d+)?(?=[/?#]|$)")
_SECRET = re.compile(
    r"(?:key|token|secret|password|passwd|pwd|auth|authorization|credentials?|cookie|signature|sig)\d*$"
)
_ABOUT_SECRETS = ("count", "format", "length", "limit", "type")  # token_limit, X-Auth-Type


def check_variable(value: str, option: str) -> None:
    """Refuse what is not the name of an environment variable.

    Args:
        value: the name.
        option: what holds it, for the message.
    """
    if not _VARIABLE.fullmatch(value):
        # It may be the key itself: not shown.
        raise ConfigurationError(
            f"{option} must be the NAME of an environment variable (capitals, digits, _), got something else; put the "
            "key into a variable and name that"
        )


def check_address(url: str, option: str, remedy: str) -> None:
    """Refuse what is no HTTP address, and a user or a key in one.

    Args:
        url: the address.
        option: what holds it, for the message.
        remedy: where a key goes instead.
    """
    if not _ADDRESS.match(url):
        if "@" in url:
            raise ConfigurationError(f"{option} must hold no user and no password: {remedy}")
        raise ConfigurationError(f"{option} must begin with http:// or https:// and a host, got {shown_address(url)!r}")
    for name, _ in parse_qsl(url.partition("#")[0].partition("?")[2]):
        if names_a_secret(name):
            raise ConfigurationError(f"{option} must not hold the value of {name!r}: {remedy}")


def shown_address(url: str) -> str:
    """An address that was checked, without what stands behind ``?``: some services take keys there under any name."""
    return re.split(r"[?#]", url)[0]


def names_a_secret(name: str) -> bool:
    """Whether a header or parameter of this name holds a key: ``X-API-KEY``, ``accessToken``, not ``keywords``."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())
    return words[-1] not in _ABOUT_SECRETS and any(_SECRET.search(word) for word in words)
