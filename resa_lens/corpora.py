"""The records under their first address: what reads `resa_lens.corpora` goes on to work."""

from resa_lens.texts.corpora import *  # noqa: F403
