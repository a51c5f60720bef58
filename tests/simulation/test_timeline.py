"""Who is served at which stage, as a picture: bins add up to the run's residents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, cases
from numpy.testing import assert_allclose
from simulation_cases import engine_table, path_of, server_of

from fluidsched.simulation import policy_timeline
from fluidsched.simulation.reference import run_reference
from fluidsched.workload.prefix_cache import PromptBlocks


def test_a_cached_prefix_is_not_prefilled():
    """Five of six prompt tokens are found: one chunk instead of three, then the second token a second later."""
    path = path_of((0.0, 6, 2))
    table = engine_table(token_budget=2)
    whole = policy_timeline(path, server_of(), table, horizon=4.0, cells=4, bins=2).residents
    assert whole.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    path = dataclasses.replace(path, cached_prompt_tokens=np.array([5]))
    found = policy_timeline(path, server_of(), table, horizon=4.0, cells=4, bins=2).residents
    assert found.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_a_block_that_another_request_computed_is_not_prefilled():
    """Two tokens an iteration: three of them for the first prompt; the second finds four of its six tokens."""
    blocks = PromptBlocks.from_lists([[1, 2, 3], [1, 2, 4]], block_tokens=2)
    path = dataclasses.replace(path_of((0.0, 6, 1), (6.0, 6, 2)), prompt_blocks=blocks)
    found = policy_timeline(path, server_of(), engine_table(token_budget=2), horizon=9.0, cells=9, bins=2)
    assert found.residents[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0]
    assert found.residents[:, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_bins_add_up_to_the_residents_of_the_run(kind, data):
    """Over cached prefixes, chunks, preemptions of every kind and requests that leave: ∫ residents dt, exactly."""
    case = data.draw(cases(kind, dyadic=True))
    horizon = case.horizon or 64.0
    path = case.path.selected(case.path.arrival_s < horizon)
    run = run_reference(path, case.server, case.table, horizon=horizon)
    shown = policy_timeline(path, case.server, case.table, horizon=horizon, cells=7, bins=5)
    assert_allclose(shown.residents.sum() * horizon / 7, run.resident_s, rtol=1e-9, atol=1e-9 * horizon)
    assert shown.residents.min() >= 0.0
