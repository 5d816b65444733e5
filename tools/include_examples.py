"""Put the files of docs/examples, and what they print, into the documents that show them.

    python tools/include_examples.py

A document marks the place: ``<!-- example NAME -->`` … ``<!-- /example -->`` shows a file,
``<!-- output NAME.py -->`` … ``<!-- /output -->`` what it prints. A test holds the documents to it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples"
_PLACE = re.compile(r"(<!-- (example|output) ([\w.]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml"}


def render(document: str) -> str:
    """The text of a document with its marked places filled."""
    return _PLACE.sub(_fill, document)


def output_of(name: str) -> str:
    """What an example prints."""
    # The examples import each other, never the modules of the caller's path.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def _fill(place: re.Match[str]) -> str:
    opening, kind, name, closing = place.groups()
    path = EXAMPLES / name
    language, body = ("text", output_of(name)) if kind == "output" else (_LANGUAGES[path.suffix], path.read_text())
    return f"{opening}```{language}\n{body}```\n{closing}"


def main() -> None:
    """Rewrite every document."""
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
