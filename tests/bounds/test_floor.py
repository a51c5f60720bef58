"""The no-wait floor against exhaustive chunkings, summed decodes and simulated runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.bounds import no_wait_floor
from fluidsched.errors import InputError

KNEE = fs.IterationTime.two_piece(
    base=0.01,
    per_token=1e-5,
    knee_tokens=40,
    per_token_beyond=1e-3,
    per_kv_token=1e-6,
    per_prefill_attention=1e-6,
)
PAPER = fs.IterationTime.paper(d0=0.01, d1=1e-5)


def one(prompt: int, output: int) -> fs.ArrivalPath:
    return fs.ArrivalPath.from_arrays([0.0], [prompt], [output])


def cheapest_by_recursion(time: fs.IterationTime, prompt: int, budget: int) -> float:
    """Least total time to prefill `prompt` tokens over all ways to cut it into chunks of at most `budget`."""
    best = np.full(prompt + 1, np.inf)
    best[0] = 0.0
    for end in range(1, prompt + 1):
        for start in range(max(0, end - budget), end):
            chunk = end - start
            duration = float(time(chunk, 0, 0, chunk * (start + chunk / 2)))
            best[end] = min(best[end], best[start] + duration)
    return float(best[prompt])


@pytest.mark.parametrize("time", [KNEE, PAPER])
@pytest.mark.parametrize("budget", [None, 7, 64])
@pytest.mark.parametrize("prompt", [1, 6, 7, 8, 41, 90])
def test_prefill_floor_is_below_every_chunking(
    time: fs.IterationTime, budget: int | None, prompt: int
) -> None:
    """And within one per cent of the best one when the budget does not cut it unevenly."""
    server = fs.Server(1000, time, token_budget=budget)
    floor = float(no_wait_floor(one(prompt, 1), server).ttft_s[0])
    best = cheapest_by_recursion(time, prompt, budget or prompt)
    assert floor <= best * (1 + 1e-12)
    assert floor >= best * 0.9
    if time is PAPER and budget is None:
        assert floor == pytest.approx(float(time(prompt, 0, 0, prompt**2 / 2)), rel=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20),
    st.lists(
        st.tuples(
            st.floats(0.001, 1),
            st.floats(0.5, 1),
            st.just(0.0) | st.floats(1e-9, 0.01),
            st.just(0.0) | st.floats(1e-9, 0.1),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_decodes_add_up_over_several_pieces(
    lengths: list[tuple[int, int]], pieces: list[tuple[float, float, float, float]]
) -> None:
    """The series on the envelope equal the sum, iteration by iteration."""
    time = fs.IterationTime.pieces([fs.IterationTime.affine(*piece) for piece in pieces])
    prompts, outputs = (np.array(x) for x in zip(*lengths, strict=True))
    path = fs.ArrivalPath.from_arrays(np.zeros(len(prompts)), prompts, outputs)
    floor = no_wait_floor(path, fs.Server(10**6, time))
    for i, (p, o) in enumerate(lengths):
        expected = sum(float(time(0, 1, p + k - 1)) for k in range(2, o + 1))
        assert floor.e2e_s[i] - floor.ttft_s[i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("time", [KNEE, PAPER])
def test_no_simulated_request_beats_the_floor(time: fs.IterationTime) -> None:
    rng = np.random.default_rng(5)
    path = fs.ArrivalPath.from_arrays(
        np.cumsum(rng.exponential(0.2, 60)), rng.integers(1, 120, 60), rng.integers(1, 40, 60)
    )
    server = fs.Server(400, time)
    runs = fs.simulate(
        path, server, [fs.baselines.vllm(), fs.baselines.sarathi(token_budget=64)], engine="reference"
    )
    floor = no_wait_floor(path, server)
    for policy in runs.policies:
        requests = runs.requests(policy)
        assert np.all(requests["first_token_s"] - requests["arrival_s"] >= floor.ttft_s * (1 - 1e-9))
        assert np.all(requests["finish_s"] - requests["arrival_s"] >= floor.e2e_s * (1 - 1e-9))


def test_models_without_a_floor_are_refused() -> None:
    cheap_recompute = fs.IterationTime.affine(0.01, 1e-9, 1e-3, 0.0)
    with pytest.raises(InputError, match="recomputing"):
        no_wait_floor(one(5, 5), fs.Server(100, cheap_recompute))
    function = fs.IterationTime.function(lambda batch: 0.01)
    with pytest.raises(InputError, match="piecewise affine"):
        no_wait_floor(one(5, 5), fs.Server(100, function))


def test_longer_requests_have_higher_floors() -> None:
    server = fs.Server(10**6, KNEE)
    for (p, o), (q, r) in itertools.pairwise([(1, 1), (1, 2), (50, 2), (50, 9), (500, 9)]):
        a, b = no_wait_floor(one(p, o), server), no_wait_floor(one(q, r), server)
        assert a.e2e_s[0] < b.e2e_s[0]
