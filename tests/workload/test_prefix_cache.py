"""Prefix caches of stated size over blocks: by hand, against other caches written here, on the Mooncake trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.workload.prefix_cache import lru_cached_tokens


def found(prompts: list[int], blocks: list[list[int]], block: int, tokens: float) -> list[int]:
    return lru_cached_tokens(np.array(prompts), blocks, block_tokens=block, cache_tokens=tokens).tolist()


def test_whole_blocks_are_found_and_the_last_token_is_computed() -> None:
    """Blocks of 4. 8 tokens found whole leave one block to compute; of 7 the last 3 are no block."""
    same = [[1, 2], [1, 2], [1, 2], [1]]
    assert found([8, 8, 9, 7], same, 4, math.inf) == [0, 4, 8, 4]


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    """Three blocks fit: after 1 2 3 and 4 there are 1, 2 and 4; 5 6 then drive out 2 and 1, the oldest."""
    blocks = [[1, 2, 3], [4], [1, 2, 3], [5, 6], [1, 2], [6]]
    assert found([13, 5, 13, 9, 9, 5], blocks, 4, 12) == [0, 0, 8, 0, 4, 0]


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    """Two blocks of four fit."""
    assert found([17, 17], [[1, 2, 3, 4], [1, 2, 3, 4]], 4, 11) == [0, 8]


def by_stamps(prompts: list[int], blocks: list[list[int]], block: int, most: int) -> list[int]:
    """Another cache: every block has the time of its last use, and the smallest goes."""
    stamp: dict[int, int] = {}
    clock, answer = 0, []
    for prompt, ids in zip(prompts, blocks, strict=True):
        whole = ids[: prompt // block]
        hits = next((k for k, name in enumerate(whole) if name not in stamp), len(whole))
        while block * hits > prompt - 1:
            hits -= 1
        answer.append(block * hits)
        for name in whole[::-1]:
            clock += 1
            stamp[name] = clock
            if len(stamp) > most:
                del stamp[min(stamp, key=stamp.__getitem__)]
    return answer


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_is_a_plain_lru(data: st.DataObject) -> None:
    """Random prompts that branch from each other, caches of 0 to 12 blocks: a second implementation agrees."""
    count = data.draw(st.integers(0, 25))
    block = data.draw(st.integers(1, 3))
    names: dict[tuple[int, ...], int] = {}
    prompts, blocks = [], []
    for _ in range(count):
        letters = data.draw(st.lists(st.integers(0, 1), max_size=5))
        ids = [names.setdefault(tuple(letters[: k + 1]), len(names)) for k in range(len(letters))]
        prompts.append(len(ids) * block + data.draw(st.integers(0 if ids else 1, block)))
        blocks.append([*ids, 10**6])  # the last block, not full
        prompts[-1] = min(prompts[-1], len(ids) * block + block - 1) or 1
    most = data.draw(st.integers(0, 12))
    assert found(prompts, blocks, block, most * block) == by_stamps(prompts, blocks, block, most)


def test_a_larger_cache_finds_no_less() -> None:
    """Inclusion: what a least-recently-used cache holds, a larger one holds too."""
    rng = np.random.default_rng(5)
    blocks = [[int(b) for b in np.cumsum(rng.integers(0, 3, 6)) + 100 * np.arange(6)] for _ in range(300)]
    prompts = [50] * 300
    totals = [sum(found(prompts, blocks, 8, size)) for size in (0, 80, 160, 640, math.inf)]
    assert totals[0] == 0
    assert totals == sorted(totals)
    assert totals[-1] > totals[1] > 0


def test_the_mooncake_trace(data_root: Path) -> None:
    """Witness of an unlimited cache: the blocks seen before, by a set; of a small one: a second implementation."""
    file = data_root / "traces" / "mooncake_synthetic_trace.jsonl"
    rows = sorted(
        (json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["timestamp"]
    )
    seen: set[int] = set()
    expected = []
    for row in rows:
        whole = row["hash_ids"][: row["input_length"] // 512]
        hits = next((k for k, name in enumerate(whole) if name not in seen), len(whole))
        expected.append(512 * min(hits, (row["input_length"] - 1) // 512))
        seen.update(whole)
    path = fs.read_trace(file, prefix_cache_tokens=math.inf)
    assert path.cached_prompt_tokens is not None
    assert path.cached_prompt_tokens.tolist() == expected
    share = path.cached_prompt_tokens.sum() / path.prompt_tokens.sum()
    small = fs.read_trace(file, prefix_cache_tokens=2e6).selected(slice(600))
    again = by_stamps(
        [row["input_length"] for row in rows[:600]],
        [row["hash_ids"] for row in rows[:600]],
        512,
        2_000_000 // 512,
    )
    assert small.cached_prompt_tokens is not None
    assert small.cached_prompt_tokens.tolist() == again
    assert 0.2 < share < 0.9
    types = path.to_workload(types=4)
    mean = float((types.arrival_rate * (types.mean_prompt_tokens - types.mean_prefill_tokens)).sum())
    assert mean / float((types.arrival_rate * types.mean_prompt_tokens).sum()) == pytest.approx(
        share, rel=1e-3
    )
    assert fs.read_trace(file).cached_prompt_tokens is None


def test_traces_without_blocks_are_refused(tmp_path: Path) -> None:
    """No ids at all, too few, or none that are numbers: with a cache's size an error that says where."""
    file = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1100, "output_length": 5}
    for ids, match in (
        (None, "does not name the blocks"),
        ([1], "line 1.* name 2 blocks"),
        (["a", "b"], "line 1"),
    ):
        file.write_text(json.dumps(row if ids is None else {**row, "hash_ids": ids}) + "\n")
        assert len(fs.read_trace(file)) == 1
        with pytest.raises(InputError, match=match):
            fs.read_trace(file, prefix_cache_tokens=1e6)
    with pytest.raises(InputError, match="blocks of request 0"):
        found([9], [[1]], 4, 100)
    with pytest.raises(InputError, match="cache_tokens"):
        found([9], [[1, 2]], 4, -1.0)
