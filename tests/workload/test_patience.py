"""Patience and aborts: laws, drawn columns, files."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fluidsched import patience
from fluidsched.errors import InputError
from fluidsched.workload import ArrivalPath, RequestType, Workload, read_trace

INF = math.inf
LAWS = (patience.fixed(3.0), patience.exponential(20.0), patience.lognormal(10.0, cv=2.0))


def mixed() -> Workload:
    return Workload(
        [
            RequestType("chat", 4.0, 9, 5, patience=patience.exponential(20.0), abort_after=60.0),
            RequestType("batch", 2.0, 90, 50),
        ]
    )


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_laws_come_back_from_plain_data(law: patience.Patience) -> None:
    assert patience.from_dict("patience", law.to_dict()) == law


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_first_draws_do_not_depend_on_how_many_follow(law: patience.Patience) -> None:
    few, many = (law.sample(np.random.default_rng(3), count) for count in (5, 50))
    np.testing.assert_array_equal(few, many[:5])


def test_means_are_what_they_say() -> None:
    """Fixed seed; 100 000 draws, a fresh seed fails with probability below 1e-4 (four standard errors)."""
    for law, mean, cv in ((LAWS[1], 20.0, 1.0), (LAWS[2], 10.0, 2.0)):
        drawn = law.sample(np.random.default_rng(8), 100_000)
        assert abs(drawn.mean() - mean) < 4.0 * cv * mean / math.sqrt(len(drawn))


def test_types_without_a_law_wait_for_ever() -> None:
    """The columns are there if any type has the law; the others' requests have infinite ones."""
    path = mixed().sample(100.0, seed=5)
    assert path.patience_s is not None
    assert path.abort_after_s is not None
    chat = path.type == 0
    assert np.isfinite(path.patience_s[chat]).all()
    assert (path.abort_after_s[chat] == 60.0).all()
    assert np.isinf(path.patience_s[~chat]).all()
    assert np.isinf(path.abort_after_s[~chat]).all()


def test_patience_changes_nothing_else() -> None:
    """Times and lengths come from streams of their own: with a law or without, the same requests."""
    with_law = mixed().sample(100.0, seed=5)
    without = mixed().with_types([RequestType("chat", 4.0, 9, 5), mixed().types[1]]).sample(100.0, seed=5)
    assert without.patience_s is None
    np.testing.assert_array_equal(with_law.arrival_s, without.arrival_s)
    assert with_law.fingerprint != without.fingerprint


def test_more_traffic_is_no_less_patient() -> None:
    """Scaled workloads and accelerated paths bring the same clients sooner; they stay as long, in seconds."""
    slow, fast = mixed().sample(100.0, seed=5), mixed().scaled(2.0).sample(50.0, seed=5)
    np.testing.assert_array_equal(slow.patience_s, fast.patience_s)
    np.testing.assert_array_equal(slow.patience_s, slow.accelerated(2.0).patience_s)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_files_carry_the_columns(suffix: str, tmp_path) -> None:
    """What is written is read back to the last bit, infinities included."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = mixed().sample(20.0, seed=1)
    file = tmp_path / f"path.{suffix}"
    path.to_csv(file) if suffix == "csv" else path.to_parquet(file)
    back = read_trace(file)
    for column in ("patience_s", "abort_after_s"):
        np.testing.assert_array_equal(getattr(back, column), getattr(path, column))


def test_workloads_come_back_from_plain_data() -> None:
    assert [Workload.from_dict(mixed().to_dict()).types] == [mixed().types]


def test_selection_and_resampling_keep_clients_with_their_requests() -> None:
    path = mixed().sample(50.0, seed=2)
    assert len(path.selected(slice(3)).patience_s) == 3
    drawn = path.bootstrapped(80.0, seed=1)
    by_request = dict(zip(path.patience_s.tolist(), path.prompt_tokens.tolist(), strict=True))
    pairs = zip(drawn.patience_s.tolist(), drawn.prompt_tokens.tolist(), strict=True)
    assert all(by_request[stay] == prompt for stay, prompt in pairs)


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ({"patience_s": [1.0, -1.0]}, r"patience_s\[1\] must be at least 0"),
        ({"abort_after_s": [math.nan, 1.0]}, r"abort_after_s\[0\] must be at least 0"),
        ({"patience_s": [1.0]}, "patience_s must have one per request"),
    ],
)
def test_bad_columns_are_refused(column, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ArrivalPath.from_arrays([0.0, 1.0], [1, 1], [1, 1], **column)


def test_bad_laws_name_the_field() -> None:
    with pytest.raises(InputError, match="patience of type 'a' must be a finite number of at least 0"):
        RequestType("a", 1.0, 1, 1, patience=-2.0)
    data = mixed().to_dict()
    data["types"][0]["patience"] = {"law": "exponential", "mean": 0}
    with pytest.raises(InputError, match=r"types\[0\]\.patience\.mean must be"):
        Workload.from_dict(data)


def test_bins_of_different_patience_are_not_joined() -> None:
    with pytest.raises(InputError, match="types of different patience"):
        mixed().merged(1)


def test_a_bad_cell_names_its_line(tmp_path) -> None:
    file = tmp_path / "path.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens,patience_s\n0,1,1,inf\n1,1,1,soon\n")
    with pytest.raises(InputError, match="line 3"):
        read_trace(file)
