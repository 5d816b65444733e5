"""The sandbox inside a container: sessions over standard input and output. Run by ``DockerBackend``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from appo_lightning.errors import AppoError
from appo_lightning.tools._sandbox import frames
from appo_lightning.tools._sandbox.client import ForkServer
from appo_lightning.tools._sandbox.limits import Limits
from appo_lightning.tools.backends.multiplexer import Multiplexer


def main() -> None:
    """Start a fork server, say so, carry its sessions until the input ends."""
    options = json.loads(sys.argv[1])
    server = ForkServer(
        Limits(**options["limits"]),
        packages=options["packages"],
        preload=options["preload"],
        waiting=options["waiting"],
        allow_unsafe=True,  # the container is the wall before the trainer
    )
    # Nothing else may write into the stream, not even a library that prints.
    stream = os.dup(1)
    os.dup2(2, 1)
    try:
        report = json.dumps(asdict(server.start())).encode()
    except AppoError as error:
        os.write(stream, frames.pack(frames.REFUSED, 0, str(error).encode()))
        return
    os.write(stream, frames.pack(frames.READY, 0, report))
    try:
        Multiplexer(0, stream, server.connect).run()
    finally:
        server.close()


if __name__ == "__main__":
    main()
