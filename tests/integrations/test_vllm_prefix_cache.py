"""Prefix caching in vLLM's real scheduler beside rules 39 to 42: what is found, shared and dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed; scripts/make_vllm_environment.sh makes a place for it"
)

from vllm_engine import Run, make_scheduler, serve

import fluidsched as fs
from fluidsched.simulation.records import EngineRun, IterationSummary
from fluidsched.simulation.reference import run_reference
from fluidsched.workload.prefix_cache import PromptBlocks

pytestmark = pytest.mark.vllm

BLOCK = 4
TIME = fs.IterationTime.affine(0.125, 2**-10, 2**-8, 2**-14)  # dyadic: times are exact


def conversations(seed: int, count: int = 300) -> fs.ArrivalPath:
    """Prompts of up to nine blocks from a tree of three roots and three branches a block, one at an instant.

    A second apart, so that no two are admitted in one iteration. One to three tokens follow the last whole block, and
    prompt and output together never fill another one: no block holds generated tokens.
    """
    rng = np.random.default_rng(seed)
    names, lengths, outputs = [], [], []
    for _ in range(count):
        way = (rng.integers(0, 3, rng.integers(1, 10))).tolist()
        names.append(
            [sum(3 ** (d + 1) * (way[d] + 1) for d in range(k + 1)) * 16 + k for k in range(len(way))]
        )
        rest = int(rng.integers(1, BLOCK))
        lengths.append(BLOCK * len(way) + rest)
        outputs.append(int(rng.integers(1, BLOCK - rest + 1)))
    arrival = np.arange(count) + rng.integers(0, 32, count) / 64
    blocks = PromptBlocks.from_lists(names, block_tokens=BLOCK)
    return fs.ArrivalPath.from_arrays(arrival, lengths, outputs, prompt_blocks=blocks)


def both(
    folder: Path, path: fs.ArrivalPath, blocks: int, time: fs.IterationTime = TIME
) -> tuple[Run, EngineRun, list[IterationSummary]]:
    """The path in vLLM, under its own rules, and on the reference engine."""
    server = fs.Server(blocks * BLOCK, time, max_batch_size=64, token_budget=512, block_size=BLOCK)
    scheduler = make_scheduler(
        folder, None, blocks=blocks, block_size=BLOCK, budget=512, slots=64, prefix_caching=True
    )
    theirs = serve(scheduler, path, server)
    summaries: list[IterationSummary] = []
    ours = run_reference(
        path, server, fs.baselines.vllm(token_budget=512), horizon=None, on_iteration=summaries.append
    )
    return theirs, ours, summaries


@pytest.mark.parametrize("blocks", [10_000, 40, 12])
def test_vllm_finds_what_the_reference_finds(tmp_path: Path, blocks: int) -> None:
    """Every iteration has the same prompt tokens, so every request the same hits: all memory, little, and least.

    With 40 blocks what was computed is dropped, least recently used first, and computed again; with 12 requests of
    ten blocks nearly fill the memory.
    """
    path = conversations(seed=5)
    theirs, ours, summaries = both(tmp_path, path, blocks)
    assert theirs.starts_s == [summary.start_s for summary in summaries]
    for number, (summary, batch) in enumerate(zip(summaries, theirs.iterations, strict=True)):
        assert batch == (dict(summary.prefill), set(summary.decode)), f"iteration {number}"
    everything = int(path.prompt_tokens.sum())
    assert 0.05 * everything < ours.cached_tokens < 0.95 * everything


def test_with_less_memory_less_is_found(tmp_path: Path) -> None:
    """The three sizes above are different cases."""
    path = conversations(seed=5)
    found = []
    for blocks in (10_000, 40, 12):
        server = fs.Server(blocks * BLOCK, TIME, max_batch_size=64, token_budget=512, block_size=BLOCK)
        table = fs.baselines.vllm(token_budget=512)
        found.append(run_reference(path, server, table, horizon=None).cached_tokens)
    assert found[0] > 1.1 * found[1] > 1.1**2 * found[2]


def twins(output: int) -> fs.ArrivalPath:
    """Two equal prompts of two whole blocks and a token."""
    blocks = PromptBlocks.from_lists([[1, 2], [1, 2]], block_tokens=BLOCK)
    return fs.ArrivalPath.from_arrays([0.0, 0.0], [9, 9], [output, output], prompt_blocks=blocks)


def test_vllm_finds_a_block_in_the_iteration_that_computes_it(tmp_path: Path) -> None:
    """vLLM names blocks when it schedules them, the reference when they are computed: twins of one iteration differ.

    The engine can, since layer by layer all KV of an iteration is written before any of it is read.
    """
    theirs, _, summaries = both(tmp_path, twins(2), 100)
    assert theirs.iterations[0][0] == {0: 9, 1: 1}
    assert dict(summaries[0].prefill) == {0: 9, 1: 9}
