"""Stages of a request's life: sums give S and W, blocks and spacing bound what can be held."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.policy.profiles import mean_profile, normal_quantile, worst_profile


def workload_of(*types):
    return fs.Workload([fs.RequestType(f"t{i}", 1.0, p, o) for i, (p, o) in enumerate(types)])


@pytest.fixture(scope="module")
def conv():
    return fs.workloads.azure_conv()


def test_stages_add_up_to_iterations_and_kv_work(conv):
    """Σ_s P(S > s) = E[S], Σ_s E[p + s; S > s] = E[W], for joint laws."""
    profile = mean_profile(conv)
    np.testing.assert_allclose(profile.present.sum(axis=1), conv.iterations, rtol=1e-12)
    np.testing.assert_allclose(profile.kv[0].sum(axis=1), conv.kv_work, rtol=1e-12)


def test_worst_stages_add_up_to_the_largest_kv_work(conv):
    profile = worst_profile(conv)
    np.testing.assert_allclose(profile.kv[0].sum(axis=1), conv.max_kv_work, rtol=1e-12)
    assert profile.kv[1].max() == 0.0


def test_mean_and_variance_of_one_stage_by_hand():
    """p = 10, o ∈ {5, 40} evenly: at stage 7 half of them hold 17 tokens."""
    profile = mean_profile(workload_of((10, fs.lengths.empirical([5, 40]))))
    mean, variance = profile.kv
    assert (mean[0, 7], variance[0, 7]) == (8.5, 8.5**2)
    assert (mean[0, 4], variance[0, 4]) == (14.0, 0.0)


def test_paging_counts_its_largest_waste():
    plain, paged = (mean_profile(workload_of((10, 3)), padding=b - 1).kv[0] for b in (1, 16))
    np.testing.assert_array_equal(paged - plain, np.full((1, 3), 15.0))


def held(prompt, output, ages):
    """KV of requests of these ages, an age being the stage they are served at."""
    return sum(prompt + s for s in ages if s < output)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 9))
def test_block_bound_is_what_the_worst_pause_holds(types, k):
    """max_r Σ_j max(f_j(r), g_j) is reached: some types paused when full, the rest in iteration r."""
    profile = mean_profile(workload_of(*types))
    k = min(k, profile.stages)
    worst = 0
    for r in range(k):
        for paused in itertools.product([False, True], repeat=len(types)):
            total = 0
            for (p, o), rests in zip(types, paused, strict=True):
                blocks = range(1 if rests else 0, -(-o // k) + 1)
                # a paused request that was served i blocks holds p + ik − 1; one served now holds p + ik + r
                total += sum(
                    p + i * k + (-1 if rests else r) for i in blocks if i * k + (0 if rests else r) < o
                )
            worst = max(worst, total)
    assert profile.block(k).mean.sum(axis=0).max() == worst
    assert profile.block(k).variance.max() == 0.0


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 14))
def test_spaced_bound_of_one_length_is_reached(prompt, output, k):
    """Σ_i (p + S − 1 − ik): entries k apart, the oldest about to leave."""
    profile = mean_profile(workload_of((prompt, output)))
    bound = profile.spaced(np.array([0])).bound(k)[0, 0]
    assert bound == held(
        prompt, output, [output - 1 - i * k for i in range(output) if output - 1 - i * k >= 0]
    )


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=4),
    st.integers(1, 11),
    st.integers(0, 2),
)
def test_spaced_bound_covers_every_pattern(points, k, lag):
    """Random lengths: no pattern of ages at least k apart, each up to `lag` behind, holds more."""
    prompts, outputs = zip(*points, strict=True)
    law = fs.lengths.joint(prompts, outputs)
    profile = mean_profile(fs.Workload([fs.RequestType("t", 1.0, lengths=law)]))
    bound = profile.spaced(np.array([lag])).bound(k)[0, 0]
    mean = [np.mean([p + s if s < o else 0 for p, o in points]) for s in range(max(outputs))]
    behind = [max(mean[max(0, age - lag) : age + 1], default=0.0) for age in range(max(outputs) + lag)]
    best = [0.0] * (len(behind) + 1)
    for age, value in enumerate(behind):
        best[age + 1] = max(best[age], value + (best[age + 1 - k] if age + 1 >= k else 0.0))
    assert bound >= best[-1] * (1 - 1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 3),
)
def test_the_bound_over_a_block_covers_every_iteration(points, k, block_size):
    """Mean and variance, running or paused; and at one length what its stages add up to."""
    prompts, outputs = zip(*points, strict=True)
    law = fs.lengths.joint(prompts, outputs)
    profile = mean_profile(fs.Workload([fs.RequestType("t", 1.0, lengths=law)]), padding=block_size - 1)
    k = min(k, profile.stages)
    block, (mean, variance) = profile.block(k), profile.block_bound(k)
    assert (block.mean <= mean[:, None] * (1 + 1e-12)).all()
    assert (block.variance <= variance[:, None] * (1 + 1e-12) + 1e-9).all()
    paused = [
        [(p + i * k + block_size - 2, 1.0) if o > i * k else (0, 1.0) for p, o in points]
        for i in range(1, -(-profile.stages // k))
    ]
    spread = sum(float(np.var([held for held, _ in stage])) for stage in paused)
    running = [
        sum(
            np.var([p + s + block_size - 1 if o > s else 0 for p, o in points])
            for s in range(r, profile.stages, k)
        )
        for r in range(k)
    ]
    np.testing.assert_allclose(block.variance[0], np.maximum(running, spread), rtol=1e-9, atol=1e-6)


def test_types_of_different_lengths_are_each_counted_from_their_own_last_stage():
    profile = mean_profile(workload_of((10, 3), (100, 11)))
    np.testing.assert_array_equal(profile.spaced(np.array([0, 0])).bound(2)[0], [12 + 10, 5 * 105 + 105])


def test_normal_quantile():
    assert normal_quantile(0.5) == 0.0
    assert round(normal_quantile(0.01), 4) == 2.3263
    assert normal_quantile(0.0) == np.inf
    with pytest.raises(fs.errors.InputError, match="overflow_probability"):
        normal_quantile(0.6)
