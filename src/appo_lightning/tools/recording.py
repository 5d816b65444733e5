"""All tools of a run on one recording, whichever they are."""

from __future__ import annotations

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools.base import Tool
from appo_lightning.tools.cassette import CassetteTool


def on_record(tools: list[Tool], *, record: str | None, replay: str | None) -> list[Tool]:
    """All tools of a run on one cassette, or as they are if neither path is given.

    Args:
        tools: of the run.
        record: path to record to.
        replay: path to replay from.

    Raises:
        ConfigurationError: both paths, or one without tools.
    """
    if record is None and replay is None:
        return tools
    if record is not None and replay is not None:
        raise ConfigurationError("data.record_tools and data.replay_tools exclude each other: give one")
    if not tools:
        raise ConfigurationError("data.record_tools and data.replay_tools have no effect without data.tools; remove it")
    path = record or replay
    if not path:
        raise ConfigurationError("data.record_tools and data.replay_tools want the path of a file, got an empty one")
    return [CassetteTool(tool, path, "record" if record else "replay") for tool in tools]
