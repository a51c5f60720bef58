r"""Compiled: whether the memory forecast for requests in service stays within a limit (`fluidsched.policy.forecast`).

Ends are gone through from the latest to the earliest. With shares w_i and h_i tokens held after the iteration now
planned, those that end at u or later hold together, in tokens of whole blocks,

    b · memory(u) = Σ_{e_i ≥ u} w_i (h_i + u) + Σ_{e_i ≥ u} w_i (−(h_i + u) mod b),

and the second sum, of the blocks' unfilled parts, follows from the shares by h_i mod b. It is at most b − 1 per share,
which mostly decides before it is added up.

Ends are whole numbers, and small: they are put in order by their digits (least significant first; Knuth, The Art of
Computer Programming 3, 5.2.5, algorithm R), at a cost linear in how many they are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["FITS", "first_beyond"]

FITS = -1

DIGIT = 9  # bits; a request's remaining output tokens have one or two digits
RADIX = 1 << DIGIT


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _still_there(lengths: Any, believed: int, least: int) -> int:
    """How many of the lengths that a request may have are at least so long; known lengths: of one."""
    if len(lengths) == 0:
        return 1 if believed >= least else 0
    count = 0
    while count < len(lengths) and lengths[len(lengths) - 1 - count] >= least:
        count += 1
    return count


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _latest_last(ends: Any, whose: Any, latest: int) -> Any:
    """Both arrays in order of the ends, none of which is above `latest`."""
    shift = 0
    while latest >> shift > 0:
        starts = np.zeros(RADIX + 1, dtype=np.int64)
        for end in ends:
            starts[((end >> shift) & (RADIX - 1)) + 1] += 1
        for digit in range(RADIX):
            starts[digit + 1] += starts[digit]
        sorted_ends = np.empty_like(ends)
        sorted_whose = np.empty_like(whose)
        for k in range(len(ends)):
            digit = (ends[k] >> shift) & (RADIX - 1)
            place = starts[digit]
            sorted_ends[place] = ends[k]
            sorted_whose[place] = whose[k]
            starts[digit] += 1
        ends, whose = sorted_ends, sorted_whose
        shift += DIGIT
    return ends, whose


@numba.njit(cache=True, nogil=True, error_model="numpy")
def first_beyond(served: Any, lengths: Any, shares: int, block: int, limit: int, witness: int) -> int:
    """Return FITS, or at which iteration ahead memory is beyond the limit; 0 where prompts alone are.

    Parameters
    ----------
    served : int64[4, N]
        Prompt, produced, after and believed of each request.
    lengths : int64[m]
        Of the law, in order; empty: believed lengths are known.
    shares : int
        Parts of a block that are counted, divisible by 1, …, m.
    block : int
        Tokens.
    limit : int
        Blocks.
    witness : int
        An iteration ahead to be looked at first, and the one after it; below 1: none.
    """
    count = served.shape[1]
    weight = np.empty(count, dtype=np.int64)
    most = limit * shares * block  # in tokens × shares
    events = 0
    for i in range(count):
        prompt, produced, after, believed = served[0, i], served[1, i], served[2, i], served[3, i]
        possible = _still_there(lengths, believed, produced + 1)
        weight[i] = shares // max(possible, 1)
        target = prompt + produced
        if after < target:  # its prompt stays incomplete: its peak at all times
            if possible == 0:
                most -= weight[i] * block * ((target + block - 1) // block)
            for k in range(possible):
                length = believed if len(lengths) == 0 else lengths[len(lengths) - 1 - k]
                most -= weight[i] * block * ((target + length - produced - 1 + block - 1) // block)
            weight[i] = 0
        else:
            events += possible
    if most < 0:
        return 0

    for ahead in range(witness, witness + 2):
        if ahead >= 1:
            memory = 0
            for i in range(count):
                still = _still_there(lengths, served[3, i], served[1, i] + ahead + 1)
                memory += weight[i] * still * ((served[2, i] + ahead + block - 1) // block)
            if memory * block > most:
                return ahead

    ends = np.empty(events, dtype=np.int64)
    whose = np.empty(events, dtype=np.int64)
    rests = np.empty(count, dtype=np.int64)
    events = latest = 0
    for i in range(count):
        rests[i] = served[2, i] % block
        if weight[i] > 0:
            for k in range(_still_there(lengths, served[3, i], served[1, i] + 2)):
                length = served[3, i] if len(lengths) == 0 else lengths[len(lengths) - 1 - k]
                ends[events] = length - served[1, i] - 1
                whose[events] = i
                latest = max(latest, ends[events])
                events += 1
    ends, whose = _latest_last(ends[:events], whose[:events], latest)
    by_rest = np.zeros(block, dtype=np.int64)
    number = tokens = worst = 0
    found = FITS
    for place in range(events - 1, -1, -1):
        i, ahead = whose[place], ends[place]
        number += weight[i]
        tokens += weight[i] * served[2, i]
        by_rest[rests[i]] += weight[i]
        if place > 0 and ends[place - 1] == ahead:
            continue
        memory = tokens + number * ahead
        if memory + number * (block - 1) <= max(most, worst):
            continue
        filled = ahead % block
        # `filled` tokens are in the last block of those with this rest; 0: it is full
        for rest in range(block):
            memory += by_rest[rest] * (block - filled if filled > 0 else 0)
            filled = filled + 1 if filled + 1 < block else 0
        if memory > max(most, worst):
            worst = memory
            found = ahead
    return found
