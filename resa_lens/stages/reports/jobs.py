"""What a worker that joined others did, on a terminal."""

from __future__ import annotations

from typing import Any

from resa_lens.stages.job_stage import Share


def share(share: Share[Any], whole: str) -> str:
    """Say what a worker did, and what it left to others.

    Args:
        share: its jobs.
        whole: what the last worker writes.
    """
    several = len(share.jobs)
    text = f"joined: {several} job{'' if several == 1 else 's'} done here"
    if share.jobs:
        text += f" ({', '.join(share.jobs[:5])}{', ...' if several > 5 else ''})"
    if share.left:
        return f"{text}; other workers are at the last {len(share.left)}"
    return text if share.run else f"{text}; another worker writes the {whole}"
