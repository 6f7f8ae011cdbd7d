"""The errors that a user sees: short, naming the offending value and what would be right."""

from __future__ import annotations


class ResaLensError(Exception):
    """Base class; the command line prints the message without a traceback."""

    exit_code = 1


class BadInputError(ResaLensError, ValueError):
    """An argument, a file or a folder is not usable; nothing was changed (exit code 2)."""

    exit_code = 2


class DamagedError(BadInputError):
    """A file or an artifact is not as it was written, or is missing."""


class TakenError(BadInputError):
    """Another process is at this very work."""


class RunFailedError(ResaLensError, RuntimeError):
    """The work began and could not go on: a non-finite loss, a full disk (exit code 1)."""


class DivergedError(RunFailedError):
    """A loss or a weight is not finite: going on from a checkpoint would end in the same."""
