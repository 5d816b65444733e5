#!/usr/bin/env python3
"""A container engine for tests: runs the command of ``run`` on this machine, without a container.

The real relay, fork server and sessions run; what the engine itself does is not tested here.
"""

import os
import sys

arguments = sys.argv[1:]
if arguments[0] != "run":
    sys.exit(0)
if "broken" in arguments:
    print("docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", file=sys.stderr)
    print("Is the docker daemon running?", file=sys.stderr)
    sys.exit(125)
if "old" in arguments:
    raise RuntimeError("this Python is too old")  # said with a traceback, as by a Python inside
volume = next(word for word in arguments if word.endswith(":ro"))
python = arguments.index("python3")
source = os.path.dirname(volume.partition(":")[0])
command = [sys.executable, *arguments[python + 1 :]]
if "without-walls" in arguments:  # as under a kernel that has none
    program = (
        "from appo_lightning.tools._sandbox.client import ForkServer; ForkServer.__init__.__kwdefaults__['walls'] = ();"
        "from appo_lightning.tools.backends.relay import main; main()"
    )
    command[1:3] = ["-c", program]
os.execve(command[0], command, {"PATH": os.defpath, "PYTHONPATH": source})
