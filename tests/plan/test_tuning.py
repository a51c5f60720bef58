"""The search over a table's numbers: finds what is there, says when nothing is, and resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy.table import PolicyTable, Segment, TableType
from fluidsched.tuning import KNOBS, Tuning, _attains, knobs_of, tune, tuning_cell

WORKLOAD = fs.Workload([fs.RequestType("a", arrival_rate=4.0, prompt_tokens=64, output_tokens=16)])
SERVER = fs.Server(2_000, fs.IterationTime.affine(0.05, 1e-4, 1e-4, 0.0), max_batch_size=64)
SHORT = {"horizon": 60.0, "candidates": 6, "confirmations": 6}


def search(table: PolicyTable, **changes: object) -> Tuning:
    return tune(WORKLOAD, SERVER, table, **{"aim": "mean_e2e", **SHORT, **changes})  # type: ignore[arg-type]


def test_the_share_attained_is_tested_again_on_fresh_paths() -> None:
    """A limit that all meet holds, one at their very share cannot be told, and the start is tested as well."""
    table = fs.baselines.vllm(max_in_service=2)
    options = {"horizon": 30.0, "aim": "mean_e2e", "knobs": {"max_in_service": (8, 32)}, "candidates": 2}
    easy = search(table, slo={"e2e": 60.0}, attainment=0.9, **options)
    assert easy.is_better
    assert easy.attained == easy.attained_winner
    assert easy.attainment_verdict == "holds"
    assert "the 90% asked for are attained" in easy.summary()
    one, low, high = easy.attained
    assert one == low == high == 1.0
    kept = search(
        easy.best, slo={"ttft": 0.08}, attainment=0.2, aim="mean_e2e", knobs={"max_in_service": (2, 3)}
    )
    assert kept.best == kept.start
    assert kept.replications == SHORT["confirmations"]
    share, low, high = kept.attained
    assert 0.0 < low < share < high <= 1.0
    assert kept.to_dict()["attained_start"] == pytest.approx(kept.attained)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        ((0.96, 0.95, 0.97), "holds"),
        ((0.96, 0.94, 0.98), "cannot be told"),
        ((0.93, 0.92, 0.94), "missed"),
        ((float("nan"),) * 3, "missed"),
    ],
)
def test_what_an_interval_says_of_the_share_asked_for(
    share: tuple[float, float, float], verdict: str
) -> None:
    assert _attains(share, 0.95) == verdict


def test_finds_that_a_cap_of_two_starves_the_server() -> None:
    """With two in service the server cannot carry 4 req/s; any larger cap is far better, on fresh paths too."""
    found = search(fs.baselines.vllm(max_in_service=2), knobs={"max_in_service": (2, 32)})
    assert found.is_better
    assert found.best is found.winner
    assert found.best.max_in_service > 2
    assert 0.0 < found.low <= found.margin <= found.high
    assert found.margin == pytest.approx(found.score_start - found.score_winner)
    assert found.best.certificate == {}  # what was certified is another table
    assert found.best.provenance["tuned_from"] == found.start.fingerprint
    assert "Better in mean_e2e" in found.summary()


def test_says_so_when_nothing_differs() -> None:
    """A watermark cannot matter where memory never binds: every score is the start's, which is kept."""
    table = fs.baselines.vllm(max_in_service=20)
    found = search(table, knobs={"watermark": (0.0, 0.01)})
    assert not found.is_better
    assert found.best == table
    assert "No candidate beat the start" in found.summary()


def test_same_seed_same_answer_and_a_stopped_search_goes_on(tmp_path: Path) -> None:
    """The journal of a finished search answers again without simulating; a rung that is lost is run again."""
    table = fs.baselines.vllm(max_in_service=2)
    first = search(table, knobs={"max_in_service": (2, 32)}, directory=tmp_path / "tune")
    journal = tmp_path / "tune" / "rung-2" / "journal.txt"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))  # stopped in the middle of the second rung
    again = search(table, knobs={"max_in_service": (2, 32)}, directory=tmp_path / "tune")
    assert again.to_dict() == first.to_dict()


def test_goodput_needs_slos_and_names_the_nearest_miss() -> None:
    table = fs.baselines.vllm(max_in_service=20)
    with pytest.raises(InputError, match="slo"):
        search(table, aim="goodput")
    with pytest.raises(InfeasibleError, match=r"nearest .* mean TTFT") as caught:
        search(table, aim="goodput", slo={"ttft": 1e-6})
    assert caught.value.reason == "slo"
    with pytest.raises(InfeasibleError, match=r"99\.9% of the requests"):
        search(table, aim="goodput", slo={"ttft": 0.06}, attainment=0.999)
    found = search(table, aim="goodput", slo={"e2e": 10.0}, attainment=0.9, candidates=2)
    assert all(candidate.met >= 0.9 for candidate in found.candidates)


def test_goodput_counts_requests_that_meet_all_slos() -> None:
    """One cell by hand: nobody waits, so everybody meets loose limits and nobody meets impossible ones."""
    base = {
        "policy": fs.baselines.vllm().to_dict(), "server": SERVER.to_dict(), "workload": WORKLOAD.to_dict(),
        "trace": None, "fold": "search", "aim": "goodput", "horizon": 50.0, "replication": 0,
    }  # fmt: skip
    seed = np.random.SeedSequence(3)
    loose = tuning_cell({**base, "slo.e2e": 100.0}, seed)
    count = len(WORKLOAD.sample(50.0, seed))
    assert loose["score"] == pytest.approx(count / 50.0)
    assert loose["met"] == pytest.approx(1.0)
    assert tuning_cell({**base, "slo.e2e": 1e-9}, seed)["score"] == 0.0


def test_stuck_candidates_are_out() -> None:
    """Literal WAIT without a hold gets stuck at the end of a path, unless nobody is left over by chance."""
    table = PolicyTable("w", "wait", (TableType("a", threshold=4, gate=4),), block_iterations=4, freeze=True)
    with pytest.raises(InfeasibleError, match="max_hold_s") as caught:
        search(table, knobs={"threshold": (0.9, 2.0)}, replications=8)
    assert caught.value.reason == "stuck"
    held = search(table, knobs={"max_hold_s": (0.5, 4.0)}, candidates=3)
    assert held.winner.types[0].max_hold_s is not None


def test_stable_rate_is_near_the_closed_form() -> None:
    """One type and a cap of N: N requests leave every 16 iterations of length T(N); the bisection finds 95 %
    to 105 % of N/(16 T) (1/256 of the bracket, growth of 1 %, and the noise of a path of 400 s)."""
    cap = 8
    per_iteration = cap / 16  # requests entering, so prompts per iteration
    time = 0.05 + 1e-4 * (per_iteration * 64 + cap - per_iteration)
    capacity = cap / (16 * time)
    found = search(
        fs.baselines.vllm(max_in_service=cap), aim="stable_rate", horizon=400.0,
        knobs={"watermark": (0.0, 0.01)}, candidates=1,
    )  # fmt: skip
    start = next(candidate for candidate in found.candidates if candidate.table == found.start)
    assert start.scores.mean() == pytest.approx(capacity, rel=0.05)


def test_a_trace_is_searched_in_its_first_half_only(tmp_path: Path) -> None:
    """The second half's requests are three times as long: search and held-out scores must show it."""
    arrival = np.arange(400) * 0.5
    output = np.where(arrival < 100.0, 8, 24)
    path = fs.ArrivalPath.from_arrays(arrival, np.full(400, 64), output)
    found = tune(
        path, SERVER, fs.baselines.vllm(max_in_service=1), aim="mean_e2e", horizon=100.0, candidates=3,
        knobs={"max_in_service": (4, 32)}, confirmations=4, directory=tmp_path / "t",
    )  # fmt: skip
    searched = next(candidate for candidate in found.candidates if candidate.table == found.winner)
    assert found.score_winner > 2.0 * searched.scores.mean()


KINDS = {
    "gated": PolicyTable("g", "gated", (TableType("a", threshold=4, gate=2, period=8),)),
    "wait": PolicyTable("w", "wait", (TableType("a", threshold=4, gate=4),), block_iterations=4, freeze=True),
    "nested": PolicyTable(
        "n", "nested-wait", (TableType("*", threshold=6, gate=6),),
        segments=(Segment(3, 6), Segment(7, 4), Segment(15, 2)), block_iterations=2, freeze=True,
    ),
    "capped": PolicyTable("c", "capped", (TableType("*"),), max_in_service=8, token_budget=512),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_default_knob_gives_valid_tables_at_both_ends(name: str) -> None:
    table = KINDS[name]
    ranges = knobs_of(table, SERVER)
    assert ranges
    for knob, (low, high) in ranges.items():
        for value in (low, (low * high) ** 0.5, high):
            changed = KNOBS[knob](table, value)
            assert PolicyTable.from_dict(changed.to_dict()) == changed
            assert dataclasses.replace(changed, name=table.name).kind == table.kind


def test_segment_cuts_stay_on_the_grid_of_blocks_and_merge_when_they_meet() -> None:
    moved = KNOBS["boundary"](KINDS["nested"], 0.5)
    assert [segment.boundary for segment in moved.segments] == [1, 3, 15]
    merged = KNOBS["boundary"](KINDS["nested"], 0.1)
    assert [segment.boundary for segment in merged.segments] == [1, 15]


def test_wrong_knobs_are_named() -> None:
    with pytest.raises(InputError, match="knobs"):
        search(fs.baselines.vllm(), knobs={"volume": (1, 2)})
    with pytest.raises(InputError, match=r"knobs\['period'\]|period"):
        search(fs.baselines.vllm(), knobs={"period": (1, 2)})
    with pytest.raises(InputError, match="the lowest value first"):
        search(fs.baselines.vllm(), knobs={"watermark": (0.1, 0.05)})
    for knob in ("gate", "boundary"):  # a table without gates or segments: nothing would be searched
        with pytest.raises(
            InputError, match=rf"knobs\['{knob}'\] must change the table 'vllm'.*max_in_service"
        ):
            search(fs.baselines.vllm(), knobs={knob: (0.5, 2)})
    with pytest.raises(InputError, match="pair"):
        search(fs.baselines.vllm(), knobs={"watermark": 3})
    with pytest.raises(InputError, match="aim"):
        search(fs.baselines.vllm(), aim="happiness")


def test_a_rate_is_carried_when_its_backlog_grows_by_no_more_than_chance() -> None:
    """A short path at a third of the capacity, whose backlog of a few requests comes and goes: the bisection is not
    led down by it, as the share of 1 % alone would be."""
    found = search(
        fs.baselines.vllm(max_in_service=8), aim="stable_rate", horizon=40.0, knobs={"watermark": (0.0, 0.01)},
        candidates=1, replications=8,
    )  # fmt: skip
    start = next(candidate for candidate in found.candidates if candidate.table == found.start)
    assert start.scores.min() > 0.7 * 9.75  # the closed form above


def test_workers_do_not_change_the_answer() -> None:
    table = fs.baselines.vllm(max_in_service=2)
    alone = search(table, knobs={"max_in_service": (2, 32)}, candidates=3)
    both = search(table, knobs={"max_in_service": (2, 32)}, candidates=3, workers=2)
    assert both.to_dict() == alone.to_dict()


def test_command_tunes_and_writes_the_table(tmp_path: Path) -> None:
    """`fluidsched tune` in a few seconds; a range that is none is named with its option."""
    spec = tmp_path / "server.json"
    spec.write_text(json.dumps(SERVER.to_dict()))
    workload = tmp_path / "workload.json"
    workload.write_text(json.dumps(WORKLOAD.to_dict()))
    start = tmp_path / "start.json"
    fs.baselines.vllm(max_in_service=2).to_json(start)
    arguments = [
        "tune", "mean_e2e", "--table", str(start), "--workload", str(workload), "--server", str(spec),
        "--candidates", "3", "--horizon", "60", "--confirmations", "4", "--quiet",
    ]  # fmt: skip
    kept = tmp_path / "kept.json"
    run = CliRunner().invoke(app, [*arguments, "--knob", "max_in_service=2:32", "--table-out", str(kept)])
    assert run.exit_code == 0, run.output
    assert "Better in mean_e2e" in run.stdout
    assert (PolicyTable.from_json(kept).max_in_service or 0) > 2
    wrong = CliRunner().invoke(app, [*arguments, "--knob", "max_in_service"])
    assert isinstance(wrong.exception, InputError) or wrong.exit_code == 2


def test_a_start_that_gets_stuck_is_given_up_for_a_winner_that_does_not() -> None:
    """WAIT for four without a hold strands up to three requests at the end of most paths; with a hold, none."""
    table = PolicyTable("w", "wait", (TableType("a", threshold=4, gate=4),), block_iterations=4, freeze=True)
    found = search(table, knobs={"max_hold_s": (0.5, 4.0)}, candidates=3, confirmations=12)
    assert found.stuck[0] > 0 == found.stuck[1]
    assert found.is_better
    assert found.best is found.winner
    assert np.isnan(found.low)
    assert f"stuck on {found.stuck[0]} of 12 fresh paths" in found.summary()


def test_a_gate_is_searched_together_with_a_hold() -> None:
    """A gate without a hold leaves the last of a path waiting; the default knobs of a gated table have both."""
    ranges = knobs_of(KINDS["gated"], SERVER)
    assert {"gate", "max_hold_s"} <= set(ranges)
    found = search(KINDS["gated"], candidates=4, confirmations=4)
    assert sum(not np.isnan(candidate.scores).any() for candidate in found.candidates) >= 4
