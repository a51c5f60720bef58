"""Busy work and block-rounded KV work against summation step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fluid_cases import iteration_times, kv_blocks_held
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.fluid import block_kv_work, busy_work, chunk_overhead

lengths = st.tuples(st.integers(1, 200), st.integers(1, 60))


@settings(max_examples=50)
@given(st.lists(lengths, min_size=1, max_size=4), iteration_times(), st.integers(1, 90))
def test_busy_work_is_the_time_added_step_by_step(
    points: list[tuple[int, int]], iteration_time: fs.IterationTime, chunk: int
) -> None:
    """A request run alone, its prompt in chunks of any size, adds w to the bases of every piece."""
    workload = fs.Workload(
        [fs.RequestType("mixed", 1.0, lengths=fs.lengths.joint(*map(list, zip(*points, strict=True))))]
    )
    coefficients = iteration_time.coefficients
    assert coefficients is not None
    expected = np.zeros(len(coefficients))
    for base, piece in enumerate(coefficients):
        for prompt, output in points:
            done = 0
            while done < prompt:
                size = min(chunk, prompt - done)
                expected[base] += piece[1] * size + piece[4] * size * (done + size / 2)
                done += size
            for k in range(2, output + 1):
                expected[base] += piece[2] + piece[3] * (prompt + k - 1)
    np.testing.assert_allclose(busy_work(workload, iteration_time)[:, 0], expected / len(points), rtol=1e-9)


@settings(max_examples=50)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 70))
def test_block_kv_work_is_the_sum_of_rounded_blocks(points: list[tuple[int, int]], block: int) -> None:
    """Joint and independent laws: the expectation of Σ b⌈(p + k − 1)/b⌉."""
    prompts, outputs = map(list, zip(*points, strict=True))
    joint = fs.RequestType("joint", 1.0, lengths=fs.lengths.joint(prompts, outputs))
    product = fs.RequestType(
        "product",
        1.0,
        prompt_tokens=fs.lengths.empirical(prompts),
        output_tokens=fs.lengths.empirical(outputs),
    )
    expected = [
        np.mean([kv_blocks_held(p, o, block) for p, o in points]),
        np.mean([kv_blocks_held(p, o, block) for p in prompts for o in outputs]),
    ]
    np.testing.assert_allclose(block_kv_work(fs.Workload([joint, product]), block), expected, rtol=1e-12)


def test_blocks_of_one_token_are_tokens() -> None:
    """No blocks and blocks of one token leave the KV work alone."""
    workload = fs.Workload([fs.RequestType("chat", 1.0, 100, 50)])
    assert block_kv_work(workload, None).tolist() == workload.kv_work.tolist()
    assert block_kv_work(workload, 1).tolist() == workload.kv_work.tolist()


def test_large_independent_laws_need_no_expansion() -> None:
    """Residues suffice: a product of two laws with thousands of atoms each is rounded exactly and fast."""
    kind = fs.RequestType(
        "wide",
        1.0,
        prompt_tokens=fs.lengths.uniform(1, 16_000),
        output_tokens=fs.lengths.uniform(1, 4_096),
    )
    workload = fs.Workload([kind])
    # Whole periods of prompts: every residue equally likely, so the mean excess per iteration is (b − 1)/2.
    rounded = workload.kv_work + 7.5 * workload.mean_output_tokens
    np.testing.assert_allclose(block_kv_work(workload, 16), rounded, rtol=1e-12)


def test_a_function_has_no_busy_work() -> None:
    """The fluid program needs affine pieces and says so."""
    workload = fs.Workload([fs.RequestType("chat", 1.0, 100, 50)])
    with pytest.raises(InputError, match="piecewise affine for the fluid program"):
        busy_work(workload, fs.IterationTime.function(lambda batch: 0.01))


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(1, 150),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_chunks_add_iterations_and_what_they_hold(prompts: list[int], chunk: int, block: int | None) -> None:
    """Every prefill iteration but the last is one more, and holds the prompt so far, in whole blocks."""
    kind = fs.RequestType("a", 1.0, prompt_tokens=fs.lengths.empirical(prompts), output_tokens=5)
    b = block or 1
    more, held = [], []
    for prompt in prompts:
        before = range(chunk, prompt, chunk)
        more.append(len(before))
        held.append(sum(b * math.ceil(tokens / b) for tokens in before))
    iterations, work = chunk_overhead(fs.Workload([kind]), chunk, block)
    np.testing.assert_allclose([iterations[0], work[0]], [np.mean(more), np.mean(held)], rtol=1e-12)


def test_chunked_prefill_in_the_program() -> None:
    """Chunks cost slots and memory but no time; a chunk longer than every prompt changes nothing."""
    workload = fs.Workload([fs.RequestType("a", 4.0, 3000, 50)])
    server = fs.Server(60_000, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7), max_batch_size=64)
    whole, long, chunked = (
        fs.solve_fluid(workload, server, chunk_tokens=chunk) for chunk in (None, 3000, 512)
    )
    np.testing.assert_array_equal(long.load, whole.load)
    assert chunked.load[0] == whole.load[0]
    assert np.all(chunked.load[1:] > whole.load[1:])
    assert chunked.batch_size == pytest.approx(whole.batch_size * 55 / 50)
    more = 512 * (1 + 2 + 3 + 4 + 5)
    assert chunked.resident_kv == pytest.approx(whole.resident_kv * (1 + more / workload.kv_work[0]))
    with pytest.raises(InputError, match="chunk_tokens"):
        fs.solve_fluid(workload, server, chunk_tokens=0)
