"""Prompts that name their blocks, and what a prefix cache of stated size finds of each.

A trace may say which blocks of b tokens a prompt begins with: ids i_1, i_2, …, equal in two requests exactly where
the prompts are equal from their beginning up to the end of that block (so an id names a whole prefix, as the hashes of
vLLM's and Mooncake's caches do). A request of p prompt tokens then has ⌊p/b⌋ whole blocks; a last block that is not
full is never kept.

There are two caches such a trace can be simulated with. One fills with the run and shares the memory of the
residents: a path with `PromptBlocks` is for it, and rules 39 to 42 of `fluidsched.simulation.reference` say what it
does. The other is a store of its own, of stated size: one list of blocks, least recently used first:

1. Requests come in the order of the path. A request finds m blocks, the most such that its first m are all in the
   cache, and

       c = b · min(m, ⌊(p − 1)/b⌋)

   tokens of it are cached: at least one is computed, and, as in vLLM, whole blocks are.
2. Then all its whole blocks are used, the last one first and the first one last, as vLLM frees the blocks of a request
   that leaves: so the end of a prompt is forgotten before its beginning, and what is kept of it is a prefix.
3. Beyond its size the cache drops the least recently used block.

The list is that of arrivals, not of a simulation: a request finds the blocks of all who came before it, though they may
still wait, and what policy serves them does not matter. That makes c a column of the path (`cached_prompt_tokens`), so
that all policies compared find the same, in either engine; it overstates what a server finds while it falls behind.
The size is that of a store of its own, beside the memory of the residents, who hold their whole prompts whether or not
others hold the same blocks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched._files import fingerprint
from fluidsched.errors import InputError
from fluidsched.workload.lengths import IntArray

__all__ = ["PromptBlocks", "lru_cached_tokens"]


@dataclass(frozen=True, eq=False)
class PromptBlocks:
    """Which blocks the prompts of N requests begin with, M names in all.

    Parameters
    ----------
    block_tokens : int
        b, tokens of a block, at least 1.
    first : int64[N + 1]
        Where the names of each request begin in `names`; the last entry is M.
    names : int64[M]
        Equal exactly where prompts are equal from their beginning up to the end of the block.

    Raises
    ------
    InputError
        For a block without tokens, or beginnings that do not rise from 0 to M.

    Examples
    --------
    >>> blocks = PromptBlocks.from_lists([[7, 8], [7, 9], []], block_tokens=16)
    >>> len(blocks), blocks.of(1).tolist(), blocks[np.array([1, 2])].first.tolist()
    (3, [0, 2], [0, 2, 2])
    """

    block_tokens: int
    first: IntArray
    names: IntArray

    def __post_init__(self) -> None:
        tokens = check_count("block_tokens", self.block_tokens, minimum=1)
        first, names = (_whole_numbers(field, getattr(self, field)) for field in ("first", "names"))
        if (
            first.ndim != 1
            or not len(first)
            or first[0] != 0
            or first[-1] != len(names)
            or (np.diff(first) < 0).any()
        ):
            raise InputError("first", self.first, f"rise from 0 to the number of names, {len(names):,}")
        for field, value in (("block_tokens", tokens), ("first", first), ("names", names)):
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, field, value)

    @classmethod
    def from_lists(cls, blocks: Sequence[Sequence[int]], *, block_tokens: int) -> PromptBlocks:
        """From one list of names per request, in the order of the path; names are numbered anew, from 0."""
        first = np.concatenate([[0], np.cumsum([len(names) for names in blocks], dtype=np.int64)])
        every = [name for names in blocks for name in names]
        number = {name: i for i, name in enumerate(dict.fromkeys(every))}
        return cls(block_tokens, first, np.array([number[name] for name in every], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, index: int) -> IntArray:
        """The names of one request."""
        return self.names[self.first[index] : self.first[index + 1]]

    def __getitem__(self, index: NDArray[Any] | slice) -> PromptBlocks:
        """Those of the requests at `index`: a mask, a slice, or indices."""
        chosen = np.arange(len(self))[index]
        counts = np.diff(self.first)[chosen]
        first = np.concatenate([[0], np.cumsum(counts)])
        places = np.repeat(self.first[chosen] - first[:-1], counts) + np.arange(first[-1])
        return PromptBlocks(self.block_tokens, first, self.names[places])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, beginnings and names."""
        columns = (np.array([self.block_tokens]), self.first, self.names)
        return fingerprint([fingerprint(column.astype("<i8").tobytes()) for column in columns])


def _whole_numbers(field: str, given: Any) -> IntArray:
    """A copy; rounding names would make prompts share what they do not."""
    array = np.array(given)
    if array.size and (array.dtype.kind not in "iu" or int(array.max()) >= 2**63):
        raise InputError(field, given, "hold whole numbers below 2^63")
    return array.astype(np.int64)


def lru_cached_tokens(
    prompt_tokens: IntArray, blocks: Sequence[Sequence[int]], *, block_tokens: int, cache_tokens: float
) -> IntArray:
    """Return how many tokens of each prompt a least-recently-used cache finds, int64[N].

    Parameters
    ----------
    prompt_tokens : int64[N]
        In order of arrival.
    blocks : sequence of sequence of int
        Ids of each prompt's blocks, at least the ⌊p/b⌋ whole ones.
    block_tokens : int
        b, tokens of a block.
    cache_tokens : float
        Size of the cache, tokens; whole blocks of it are used. May be infinite.

    Raises
    ------
    InputError
        For a size below 0, or a prompt with fewer ids than whole blocks.

    Examples
    --------
    >>> prompts = np.array([40, 48, 33])
    >>> lru_cached_tokens(prompts, [[1, 2, 3], [1, 2, 4], [1, 2, 5]], block_tokens=16, cache_tokens=math.inf)
    array([ 0, 32, 32])
    >>> lru_cached_tokens(prompts, [[1, 2, 3], [1, 2, 4], [1, 2, 5]], block_tokens=16, cache_tokens=16)
    array([ 0, 16, 16])
    """
    block_tokens = check_count("block_tokens", block_tokens, minimum=1)
    cache_tokens = check_real("cache_tokens", cache_tokens, minimum=0.0, allow_inf=True)
    most = math.inf if math.isinf(cache_tokens) else cache_tokens // block_tokens
    kept: OrderedDict[int, None] = OrderedDict()
    cached = np.zeros(len(prompt_tokens), dtype=np.int64)
    for i, (prompt, ids) in enumerate(zip(prompt_tokens.tolist(), blocks, strict=True)):
        whole = prompt // block_tokens
        if len(ids) < whole:
            raise InputError(
                f"blocks of request {i}",
                f"{len(ids)} ids",
                f"name the {whole} whole blocks of {block_tokens} tokens of its {prompt:,} prompt tokens",
            )
        found = 0
        while found < whole and ids[found] in kept:
            found += 1
        cached[i] = block_tokens * min(found, (prompt - 1) // block_tokens)
        for block in reversed(ids[:whole]):
            kept[block] = None
            kept.move_to_end(block)
            if len(kept) > most:
                kept.popitem(last=False)
    return cached
