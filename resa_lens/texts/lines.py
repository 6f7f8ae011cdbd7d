"""Lines behind their checksums: a byte that changed is seen where its line is read."""

from __future__ import annotations

import zlib


def checked_line(text: bytes) -> bytes:
    r"""Return a text as a line: 8 hex digits of CRC-32, a space, the text and "\n".

    Args:
        text: without a "\n" in it.
    """
    return b"%08x %b\n" % (zlib.crc32(text + b"\n"), text)


def read_line(line: bytes) -> bytes:
    r"""Return the text of a line, its "\n" included.

    Raises:
        ValueError: a byte of it changed since it was written.
    """
    check, _, text = line.partition(b" ")
    if check != b"%08x" % zlib.crc32(text):
        raise ValueError("a line is damaged")
    return text
