"""Copies: texts that are there before, exactly or nearly.

A text that copies another is easy for retrieval heads and so scores high without being worth it. Near copies are found
by MinHash (A. Broder, 1997): of the sets of word 5-grams A and B,

    P( min h(A) = min h(B) ) = |A ∩ B| / |A ∪ B| ,

estimated over `PERMUTATIONS` hashes; candidates share all hashes of one of `BANDS` bands. Everything is kept in arrays
on the disk: memory is that of sorting one band, 16 bytes per text.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

MODES = ("exact", "near", "none")
#: Words of a shingle.
SHINGLE = 5
#: 64 hashes estimate a likeness to about 0.06; 16 bands of 4 find 99.9 % of the pairs that are 0.8 alike.
PERMUTATIONS, BANDS = 64, 16
LIKENESS = 0.8
#: A Mersenne prime: hashes and coefficients below it have products below 2⁶².
PRIME = np.uint64(2**31 - 1)


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(20250507293))
    first = generator.integers(1, int(PRIME), PERMUTATIONS, dtype=np.uint64)
    return first, generator.integers(0, int(PRIME), PERMUTATIONS, dtype=np.uint64)


_FACTOR, _SHIFT = _coefficients()


def signature(text: str) -> UInt32[np.ndarray, " permutations"]:
    """The MinHash signature of the lower-case word 5-grams of a text (of all its words where there are fewer)."""
    words = text.lower().split()
    count = max(len(words) - SHINGLE + 1, 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(count)}
    hashes = np.fromiter(shingles, np.uint64, len(shingles)) % PRIME
    least = np.full(PERMUTATIONS, PRIME, np.uint64)
    for start in range(0, len(hashes), 4096):
        part = (hashes[start : start + 4096, None] * _FACTOR + _SHIFT) % PRIME
        least = np.minimum(least, part.min(0))
    return least.astype(np.uint32)


def exact_copies(hashes: UInt64[np.ndarray, " texts"]) -> Iterator[tuple[int, int]]:
    """(copy, original): texts whose hash an earlier one has, and the first of those, in the order of the copies."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(order)])
    firsts = np.repeat(order[starts], lengths)
    later = order != firsts
    copies, originals = order[later], firsts[later]
    for at in np.argsort(copies):
        yield int(copies[at]), int(originals[at])


def near_copies(path: Path, texts: int) -> Iterator[tuple[int, int]]:
    """(copy, original) from the file of signatures of `texts` texts. A copy shares a band with an earlier text that it
    is `LIKENESS` like; where that one is a copy too, the original is the first of the chain."""
    signatures: UInt32[np.ndarray, "texts permutations"] = np.memmap(
        path, np.uint32, mode="r", shape=(texts, PERMUTATIONS)
    )
    original = np.full(texts, -1, np.int64)
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        _join_band(signatures, original, slice(band * width, (band + 1) * width))
    for copy in np.flatnonzero(original >= 0):
        root = int(original[copy])
        while original[root] >= 0:
            root = int(original[root])
        yield int(copy), root


def _join_band(signatures: np.ndarray, original: np.ndarray, band: slice) -> None:
    """Marks the copies among texts that have the same hashes in a band: each is held against the first of them."""
    mixed = np.zeros(len(signatures), np.uint64)
    for column in range(band.start, band.stop):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column]
    order = np.argsort(mixed, kind="stable")
    ordered = mixed[order]
    same: Bool[np.ndarray, " pairs"] = np.r_[False, ordered[1:] == ordered[:-1]] if len(order) else np.zeros(0, bool)
    first = np.where(same, -1, order)
    leader = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))] if len(order) else first
    for at in np.flatnonzero(same):
        copy, before = int(order[at]), int(leader[at])
        if original[copy] < 0 and np.mean(signatures[copy] == signatures[before]) >= LIKENESS:
            original[copy] = before
