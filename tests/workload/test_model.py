"""Workloads: moments by brute force, laws of sampling, round trips, errors."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError


def brute_force(law: fs.lengths.JointLaw, f) -> float:
    """E[f(p, o)] summed point by point, iteration by iteration where f does so."""
    return sum(w * f(int(p), int(o)) for p, o, w in zip(*law.atoms(), strict=True))


LAWS = {
    "fixed": fs.RequestType("fixed", 1.0, 512, 21),
    "independent": fs.RequestType(
        "independent", 2.0, fs.lengths.uniform(1, 9), fs.lengths.empirical([5, 40])
    ),
    "joint": fs.RequestType("joint", 3.0, lengths=fs.lengths.joint([10, 10, 300], [5, 40, 7], [1, 2, 3])),
}


@pytest.mark.parametrize("kind", LAWS)
def test_work_per_request_is_the_sum_over_its_iterations(kind: str) -> None:
    """S, τ, W of theory.md section 1: iteration k = 1..o holds p + k − 1 tokens."""
    law = LAWS[kind].law
    workload = fs.Workload([LAWS[kind]])
    expected = {
        "iterations": brute_force(law, lambda p, o: o),
        "processed_tokens": brute_force(law, lambda p, o: p + o - 1),
        "kv_work": brute_force(law, lambda p, o: sum(p + k - 1 for k in range(1, o + 1))),
        "prefill_attention": brute_force(law, lambda p, o: p * p / 2),
        "mean_prompt_tokens": brute_force(law, lambda p, o: p),
        "mean_output_tokens": brute_force(law, lambda p, o: o),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(workload, name), [value], rtol=1e-13, err_msg=name)


def test_largest_work_uses_the_largest_lengths() -> None:
    """theory.md section 1: three requests of p = 10, o in {5, 40}: 1860 expected; W^max = 1180 each."""
    half = fs.Workload([fs.RequestType("a", 1.0, 10, fs.lengths.empirical([5, 40]))])
    assert 3 * half.kv_work[0] == 1860
    assert half.max_kv_work[0] == 40 * 10 + 40 * 39 / 2


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=8),
    st.just(0.0) | st.floats(1e-12, 1e3),
)
def test_moments_by_brute_force(points: list[tuple[int, int, int]], rate: float) -> None:
    """Every array of a workload is the expectation, point by point and iteration by iteration."""
    law = fs.lengths.joint(*(list(column) for column in zip(*points, strict=True)))
    workload = fs.Workload([fs.RequestType("a", rate, lengths=law), LAWS["fixed"]])
    work = brute_force(law, lambda p, o: sum(p + k - 1 for k in range(1, o + 1)))
    np.testing.assert_allclose(workload.kv_work, [work, 512 * 21 + 21 * 10], rtol=1e-12)
    assert workload.total_arrival_rate == pytest.approx(rate + 1)
    largest = max(p for p, _, _ in points), max(o for _, o, _ in points)
    assert (workload.max_prompt_tokens[0], workload.max_output_tokens[0]) == largest


laws = st.one_of(
    st.integers(1, 5000),
    st.builds(fs.lengths.fixed, st.integers(1, 5000)),
    st.builds(fs.lengths.empirical, st.lists(st.integers(1, 99), min_size=1, max_size=5)),
    st.builds(lambda lo, n: fs.lengths.uniform(lo, lo + n), st.integers(1, 9), st.integers(0, 9)),
    st.builds(lambda m: fs.lengths.geometric(m, maximum=200), st.floats(1.5, 90)),
    st.builds(lambda m, cv: fs.lengths.lognormal(m, cv, maximum=200), st.floats(2, 90), st.floats(0.1, 3)),
)
joints = st.builds(
    lambda points: fs.lengths.joint(*(list(column) for column in zip(*points, strict=True))),
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99), st.floats(0.1, 9)), min_size=1, max_size=6),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "prompt_range": st.just((1, None)),
        "output_range": st.just((1, 5000)),
        "priority": st.floats(-5, 5),
    },
).filter(lambda o: ("prompt_range" in o) == ("output_range" in o))
rates = st.just(0.0) | st.floats(1e-12, 1e6)
request_types = st.one_of(
    st.builds(lambda r, p, o, k: fs.RequestType("t", r, p, o, **k), rates, laws, laws, options),
    st.builds(lambda r, law, k: fs.RequestType("t", r, lengths=law, **k), rates, joints, options),
    st.builds(
        lambda r, a: fs.RequestType(
            "t", r, lengths=fs.lengths.IndependentLengths(fs.lengths.fixed(a), fs.lengths.uniform(1, a))
        ),
        rates,
        st.integers(1, 99),
    ),
)


@given(st.lists(request_types, min_size=1, max_size=3))
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, members: list[fs.RequestType]) -> None:
    """What is written is read back equal: rates, laws and moments to the last bit, and the fingerprint."""
    named = [dataclasses.replace(t, name=f"type {i}") for i, t in enumerate(members)]
    workload = fs.Workload(named, "w", "what it is", "where from")
    file = tmp_path_factory.mktemp("json") / "w.json"
    assert workload.to_json(file) == file.read_text(encoding="utf-8")
    back = fs.Workload.from_json(file)
    assert back == workload
    assert back.fingerprint == workload.fingerprint
    assert (back.name, back.description, back.source) == ("w", "what it is", "where from")
    for array in ("arrival_rate", "kv_work", "prefill_attention", "max_kv_work"):
        np.testing.assert_array_equal(getattr(back, array), getattr(workload, array))
    assert pickle.loads(pickle.dumps(workload)) == workload


def document(**change: object) -> dict:
    """A valid workload document with one thing changed; a key set to None is removed."""
    entry = {"name": "a", "arrival_rate": 1.0, "prompt_tokens": 10, "output_tokens": 5}
    data = {"schema": "fluidsched.workload/1", "name": "w", "types": [entry]}
    for key, value in change.items():
        target = data if key in ("schema", "types", "extra") else entry
        target[key] = value
        if value is None:
            del target[key]
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "fluidsched.workload/2"}, "workload.schema must be 'fluidsched.workload/1'"),
        ({"schema": None}, "workload.schema must be 'fluidsched"),
        ({"types": None}, "workload.types must be given"),
        ({"types": {}}, "types must be a list"),
        ({"types": []}, "types must hold at least one"),
        ({"types": [5]}, "types[0] must be a mapping"),
        ({"extra": 1}, "workload.extra must be left out"),
        ({"name": None}, "types[0].name must be given"),
        ({"name": ""}, "types[0]: name must be a non-empty string"),
        ({"arrival_rate": None}, "types[0].arrival_rate must be given"),
        ({"arrival_rate": "1"}, "arrival_rate of type 'a' must be a finite number"),
        ({"arrival_rate": float("nan")}, "arrival_rate of type 'a' must be a finite number"),
        ({"arrival_rate": -1.0}, "Use 0 to switch a type off"),
        ({"arival_rate": 1.0}, "Did you mean 'arrival_rate'?"),
        ({"prompt_tokens": 0}, "prompt_tokens of type 'a' must be a whole number of at least 1"),
        ({"prompt_tokens": None}, "prompt_tokens of type 'a' must be given"),
        ({"prompt_tokens": {"law": "geometric", "mean": 0.5}}, "types[0].prompt_tokens.mean must"),
        ({"lengths": {"prompt_tokens": [1], "output_tokens": [1]}}, "Give either a joint law or the two"),
        (
            {"prompt_tokens": None, "output_tokens": None, "lengths": {"prompt_tokens": [1]}},
            "lengths.output_tokens",
        ),
        (
            {
                "prompt_tokens": None,
                "output_tokens": None,
                "lengths": {"prompt_tokens": [0], "output_tokens": [1]},
            },
            "types[0].lengths.prompt_tokens[0]",
        ),
        ({"prompt_range": [1, None]}, "given for prompt and output"),
        ({"prompt_range": [1], "output_range": [1, None]}, "be a pair [lo, hi]"),
        ({"prompt_range": [0, None], "output_range": [1, None]}, "whole number of at least 1"),
        ({"prompt_range": [1, 9], "output_range": [1, "inf"]}, "hold the law's lengths, 10..10"),
        ({"priority": "high"}, "priority of type 'a' must"),
    ],
)
def test_reading_is_strict(change: dict, message: str) -> None:
    """Anything unknown, missing or out of range is refused, and the field is named."""
    with pytest.raises(InputError) as caught:
        fs.Workload.from_dict(document(**change))
    assert message in str(caught.value)


def test_infinite_upper_ends_may_be_spelled() -> None:
    """null and "inf" both mean no upper end."""
    for end in (None, "inf", float("inf")):
        data = document(prompt_range=[1, end], output_range=[1, end])
        assert fs.Workload.from_dict(data).types[0].prompt_range == (1, None)


def test_types_know_joint_or_marginal_laws_not_both() -> None:
    """A type needs exactly one description of its lengths."""
    law = fs.lengths.joint([1], [1])
    with pytest.raises(InputError, match="be given alone"):
        fs.RequestType("a", 1.0, 5, lengths=law)
    with pytest.raises(InputError, match="be a joint law"):
        fs.RequestType("a", 1.0, lengths=fs.lengths.fixed(3))
    with pytest.raises(InputError, match="output_tokens of type 'a' must be given"):
        fs.RequestType("a", 1.0, 5)


def test_unique_names_are_required() -> None:
    """Two types of one name, no types, and things that are not types are refused."""
    with pytest.raises(InputError, match="unique"):
        fs.Workload([LAWS["fixed"], LAWS["fixed"]])
    with pytest.raises(InputError, match="at least one"):
        fs.Workload([])
    with pytest.raises(InputError, match=r"types\[0\] must be a RequestType"):
        fs.Workload([5])


def test_rates_can_be_replaced_and_scaled() -> None:
    """Only the rates change; wrong shapes and negative factors are refused."""
    workload = fs.Workload(LAWS.values())
    assert workload.scaled(0.5).arrival_rate.tolist() == [0.5, 1.0, 1.5]
    other = workload.with_rates([1, 0, 2])
    assert other.arrival_rate.tolist() == [1.0, 0.0, 2.0]
    np.testing.assert_array_equal(other.kv_work, workload.kv_work)
    for wrong in ([1, 2], 3.0, [1, 2, -1], [1, 2, np.nan]):
        with pytest.raises(InputError, match="arrival_rate"):
            workload.with_rates(wrong)
    with pytest.raises(InputError, match="zeta"):
        workload.scaled(-1.0)


@pytest.mark.parametrize("x", [0.3, 0.8, 1.0, 1.3])
def test_at_load_puts_the_mix_at_that_share_of_the_boundary(x: float) -> None:
    """The largest load of the fluid solution is x, also beyond the boundary and from any starting rates."""
    server = fs.Server(100_000, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7))
    workload = fs.Workload(LAWS.values())
    for start in (workload, workload.scaled(1e-4), workload.scaled(1e4)):
        scaled = start.at_load(x, server)
        assert fs.solve_fluid(scaled, server).load.max() == pytest.approx(x, rel=1e-7)
        np.testing.assert_allclose(scaled.arrival_rate / scaled.total_arrival_rate, np.array([1, 2, 3]) / 6)
    with pytest.raises(InputError, match="positive sum"):
        workload.scaled(0.0).at_load(x, server)
    with pytest.raises(InputError, match="x must"):
        workload.at_load(-x, server)


def test_arrays_cannot_be_written_to() -> None:
    """Public arrays are read-only."""
    workload = fs.Workload(LAWS.values())
    for array in (workload.arrival_rate, workload.kv_work, workload.moment(1, 1), LAWS["joint"].law.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_workloads_print_and_tabulate() -> None:
    """One line per type, units named; the frame has one row per type and shares that sum to 1."""
    workload = fs.Workload(LAWS.values(), "three")
    lines = repr(workload).splitlines()
    assert lines[0] == "Workload 'three': 3 types, 6 req/s"
    assert len(lines) == 4
    frame = workload.to_frame()
    assert frame.index.tolist() == list(workload.type_names)
    assert frame["kv_work_share"].sum() == pytest.approx(1)
    assert "<table" in workload._repr_html_()
    assert repr(LAWS["fixed"]).startswith("RequestType('fixed', 1 req/s, prompt fixed(tokens=512)")
