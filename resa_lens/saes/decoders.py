"""One SAE's decoder read from its file block by block, without torch: what the app needs of it.

Only the decoder's bytes are read, a few megabytes at a time, whatever floating type they have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import open_regular

FILES = ("sae.safetensors", "sae_weights.safetensors")
"""Weights of sparsify's layout, and of SAELens': both hold the decoder [d_sae, d_in] as W_dec."""
TENSOR = "W_dec"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' name of each floating type, and as what numpy reads it; of bfloat16 the bits."""
BLOCK_BYTES = 8 * 2**20
"""Of the file that are read at once."""
_HEADER = 64 * 2**20  # bytes of a header, at most
_SQUARES = 1e-20, 1e30  # sums of squares that float32 holds with all that matters of them

Rows = Float[np.ndarray, "row d_in"]


@dataclass(frozen=True)
class Decoder:
    """Where an SAE's decoder lies in its file."""

    file: Path
    d_sae: int
    d_in: int
    dtype: str
    """A key of `DTYPES`."""
    start: int
    """Byte of the file at which the first row begins."""

    def row(self, latent: int) -> Float[np.ndarray, " d_in"]:
        """Return the direction of one latent, [d_in] in float32, or in float64 as the file's.

        Raises:
            BadInputError: there is no such latent, the file cannot be read, or the direction is
                zero or not finite.
        """
        if not 0 <= latent < self.d_sae:
            raise BadInputError(
                f"feature {latent} is out of range: {self.file} has 0 to {self.d_sae - 1}"
            )
        _, rows = next(self._blocks(latent, latent + 1))
        if not np.isfinite(rows).all():
            raise DamagedError(f"{self.file}: the direction of {latent} is not finite")
        if not rows.any():
            raise BadInputError(f"{self.file}: the direction of {latent} is zero; nothing is near")
        return rows[0]

    def nearest(
        self, direction: Float[np.ndarray, " d_in"], count: int, *, without: int | None = None
    ) -> list[tuple[int, float]]:
        """Return the latents whose directions are nearest to one, with the cosines, nearest first.

        Args:
            direction: [d_in], not zero.
            count: how many at most.
            without: a latent that is left out: the direction's own.

        Raises:
            BadInputError: another width, the file cannot be read, or it holds what is not finite.
        """
        if direction.size != self.d_in:
            raise BadInputError(
                f"directions of widths {direction.size} and {self.d_in} have no cosine; "
                "resa-lens match-features compares such SAEs by their activations"
            )
        unit = _scaled(direction.astype(np.float64)[None])[0]
        unit /= np.linalg.norm(unit)
        cosines = np.empty(self.d_sae)
        # What is not finite is said below.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for first, rows in self._blocks(0, self.d_sae):
                squares, part = np.vecdot(rows, rows), cosines[first : first + len(rows)]
                part[:] = (rows @ unit.astype(rows.dtype)) / np.sqrt(squares)
                # Of a longer or shorter row the squares overflow or vanish.
                odd = ~((squares > _SQUARES[0]) & (squares < _SQUARES[1]))
                if odd.any():
                    block = _scaled(rows[odd].astype(np.float64))
                    # A row of zeros has no direction: its cosine is 0.
                    part[odd] = (block @ unit) / np.maximum(np.linalg.norm(block, axis=1), 1)
        if not np.isfinite(cosines).all():
            place = int(np.flatnonzero(~np.isfinite(cosines))[0])
            raise DamagedError(f"{self.file}: the direction of {place} is not finite")
        if without is not None:
            cosines[without] = -np.inf
        count = min(count, self.d_sae - (without is not None))
        best = np.argpartition(-cosines, min(count, self.d_sae - 1))[:count]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return [(int(latent), float(cosines[latent])) for latent in best]

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, Rows]]:
        """Yield the number of the first row of each block, and its rows in float32 or float64."""
        kind = np.dtype(DTYPES[self.dtype])
        width = self.d_in * kind.itemsize
        step = max(1, BLOCK_BYTES // width)
        raw = np.empty((min(step, last - first), self.d_in), kind)
        with open_regular(self.file) as descriptor:
            for start in range(first, last, step):
                block = raw[: min(step, last - start)]
                # Not mapped into memory: a file that shrinks meanwhile would end the process.
                view, done = block.data.cast("B"), 0
                while done < len(view):
                    place = self.start + start * width + done
                    if not (read := _read(self.file, descriptor, view[done:], place)):
                        raise DamagedError(f"{self.file} ends within its decoder")
                    done += read
                yield start, _floats(block, self.dtype)


def _read(file: Path, descriptor: int, into: memoryview, place: int) -> int:
    try:
        return os.preadv(descriptor, [into], place)
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from error


def _floats(rows: NDArray[Any], dtype: str) -> Rows:
    if dtype == "BF16":  # the upper half of a float32
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def _scaled(rows: Rows) -> Rows:
    """Rows of the same directions whose largest entry is 1: no square overflows."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return rows / np.where(largest == 0, 1, largest)


def weights_file(folder: Path) -> Path:
    """Return the file with an SAE's weights.

    Raises:
        BadInputError: the folder has none of a layout whose decoder can be read here.
    """
    files = [folder / name for name in FILES]
    if file := next((file for file in files if file.is_file()), None):
        return file
    raise BadInputError(f"{folder} has no {' or '.join(FILES)}")


def open_decoder(folder: Path) -> Decoder:
    """Read where the decoder lies in an SAE's file, and check that it lies there whole.

    Args:
        folder: of one SAE, in sparsify's or SAELens' layout.

    Raises:
        BadInputError: missing, damaged, without a decoder, or of another type.
    """
    file = weights_file(folder)
    with open_regular(file) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= length <= min(size - 8, _HEADER):
            raise DamagedError(f"{file} is no safetensors file, or truncated")
        header = os.pread(descriptor, length, 8)
    try:
        entry = json.loads(header)[TENSOR]
        dtype, (d_sae, d_in), (start, end) = (
            entry[key] for key in ("dtype", "shape", "data_offsets")
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{file} names no matrix {TENSOR}; it is damaged") from error
    if any(type(number) is not int for number in (d_sae, d_in, start, end)):
        raise DamagedError(f"{file}: the shape or place of {TENSOR} is none of whole numbers")
    dtype = str(dtype)
    if dtype not in DTYPES:
        raise BadInputError(f"{file}: {TENSOR} is {dtype:.20}; {', '.join(DTYPES)} are readable")
    wide = np.dtype(DTYPES[dtype]).itemsize
    if min(d_sae, d_in) < 1 or start < 0 or end - start != d_sae * d_in * wide:
        raise DamagedError(f"{file}: the extent of {TENSOR} is not that of its shape")
    if 8 + length + end > size:
        raise DamagedError(f"{file} is truncated: {TENSOR} ends beyond it")
    return Decoder(file, d_sae, d_in, dtype, 8 + length + start)
