"""The process that compares answers as mathematics: JSON lines in, JSON lines out.

Run as a script by `judge`, never imported by it: sympy, and whatever a hostile answer makes it
allocate, stay in here.  Imports nothing of resa-lens, so that no path has to be set up.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys


def serve(memory: int, timeout: int) -> None:
    """Answer requests until stdin ends; wrong is also what does not parse, fit or end in time."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    from math_verify import parse, verify

    # Other prints must not be taken for an answer.
    replies, sys.stdout = sys.stdout, sys.stderr
    replies.write(json.dumps("ready") + "\n")
    replies.flush()
    for line in sys.stdin:
        prediction, gold = json.loads(line)
        try:
            target = parse(f"\\boxed{{{gold}}}", parsing_timeout=timeout)
            found = parse(f"\\boxed{{{prediction}}}", parsing_timeout=timeout)
            equal = bool(verify(target, found, timeout_seconds=timeout))
        except (MemoryError, RecursionError):
            equal = False
        replies.write(json.dumps(equal) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
