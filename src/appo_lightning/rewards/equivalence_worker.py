"""The process behind ``EquivalenceChecker``: one JSON pair [reference, answer] per line in, true or false out."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 * 2**30  # address space; towers of powers fill the memory before they use up their time


def main() -> None:
    """Answer until standard input ends; a comparison beyond its CPU seconds ends the process."""
    seconds = float(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not be taken for a verdict
    from math_verify import parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel's default action ends the process even inside a C call, where a Python handler would wait.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C reaches the whole terminal group; only the end of standard input stops the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", file=answers, flush=True)

    for line in sys.stdin:
        reference, answer = (f"\\boxed{{{expression}}}" for expression in json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = verify(
            parse(reference, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None
        )
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(verdict)), file=answers, flush=True)


if __name__ == "__main__":
    main()
