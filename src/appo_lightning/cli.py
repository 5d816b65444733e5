"""The ``appo`` command. Imports what a request needs, not more: ``appo --help`` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from appo_lightning import __version__
from appo_lightning.errors import AppoError

USAGE = """\
usage: appo {fit,validate,test,predict} --config FILE [--key.sub_key VALUE ...]
       appo export --config FILE --ckpt_path FILE --output DIR [--adapters]
       appo create-tiny --output DIR [--seed N] [--function-calls]

  fit          train: stage "appo" (rollouts) or "sft" (cold start on demonstrations), as the config says
  validate     sample the validation tasks and report success
  test         the same on the validation tasks, logged under test/
  predict      sample the validation tasks and write every rollout as JSONL
  export       write a trained policy as an ordinary transformers (or PEFT) checkpoint
  create-tiny  make a tiny random policy with its tokenizer, for the embedded world

Every option:          appo fit --help
A config to start from: appo fit --print_config
A class's options:     appo fit --data.sampler.help VLLMSampler
Errors come as one line; APPO_TRACEBACK=1 shows where they come from.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the command did its work, 1 after an error, 2 after wrong arguments, 128 + n after signal n.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"appo-lightning {__version__}")
        return 0
    # Idle OpenMP threads that spin take the core from the engine's.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The engine's notes about memory nodes are no news to a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A user's own tools and rewards lie beside the config, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _dispatch(arguments[0], arguments[1:])
    except AppoError as error:
        if os.environ.get("APPO_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a directory that cannot be written, a full disk
        if os.environ.get("APPO_TRACEBACK"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(command: str, arguments: list[str]) -> int:
    from appo_lightning.environment import check_environment

    check_environment()
    if command == "create-tiny":
        from appo_lightning.tasks.lookup.create import main as create

        create(arguments)
        return 0
    from appo_lightning.lightning_cli import run, run_export

    if command == "export":
        return run_export(arguments)
    return run(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
