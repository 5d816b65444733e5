"""What every HTTP client here agrees on."""

from __future__ import annotations

import logging


def keep_keys_out_of_logs() -> None:
    """Hold the HTTP library's loggers to warnings: below that they tell addresses and headers, and so keys."""
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
