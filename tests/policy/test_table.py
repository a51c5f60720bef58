"""The policy table: validated when made and when read, whole through JSON and CSV, first match wins."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidsched.errors import InputError
from fluidsched.policy import Lookahead, Match, PolicyTable, Segment, TableType, baselines
from fluidsched.policy.table import SCHEMA

WAIT = PolicyTable(
    "wait",
    "wait",
    [
        TableType("short", Match((1, 100), (1, 50)), 4.0, 4.0, threshold=3, gate=3),
        TableType("long", Match((101, None), (51, None)), 2.0, 0.0, threshold=0, gate=0, max_hold_s=2.5),
    ],
    block_iterations=8,
    freeze=True,
    predictor="exact",
    certificate={"memory": {"value": math.inf, "unit": "tokens"}},
    provenance={"inputs": {}, "version": "0", "seed": None},
)
GATED = PolicyTable(
    "gated",
    "gated",
    [TableType("a", Match(label="a"), 1.5, 1.25, threshold=2, gate=1, period=7, priority=1)],
    token_budget=2048,
    watermark=0.01,
    lookahead=Lookahead("law", 512.5, (3, 8, 8, 40)),
)
NESTED = PolicyTable(
    'nested, "quoted"',
    "nested-wait",
    [TableType("*", threshold=10, gate=10)],
    [Segment(19, 10), Segment(39, 4, 12.25)],
    block_iterations=2,
    freeze=True,
)
TABLES = [WAIT, GATED, NESTED, baselines.vllm(), baselines.sarathi(), baselines.orca(1000)]


class Path(SimpleNamespace):
    """A stand-in with what classify reads of an ArrivalPath."""

    def __len__(self):
        return len(self.prompt_tokens)

    def label(self, i):
        return None if self.type is None else self.type_names[self.type[i]]


def a_path(prompt, output, predicted=None, type_index=None, names=()):
    return Path(
        prompt_tokens=np.asarray(prompt),
        output_tokens=np.asarray(output),
        predicted_output_tokens=None if predicted is None else np.asarray(predicted),
        type=None if type_index is None else np.asarray(type_index),
        type_names=tuple(names),
    )


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.kind)
def test_json_round_trip(table, tmp_path):
    """What is written is what is read, infinities in the certificate included."""
    text = table.to_json(tmp_path / "policy.json")
    assert json.loads(text)["schema"] == SCHEMA
    again = PolicyTable.from_json(tmp_path / "policy.json")
    assert again == table
    assert again.fingerprint == table.fingerprint
    assert again.to_json() == text


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.kind)
def test_csv_round_trip_but_certificate_and_provenance(table, tmp_path):
    table.to_csv(tmp_path / "policy.csv")
    again = PolicyTable.from_csv(tmp_path / "policy.csv")
    assert again == dataclasses.replace(table, certificate={}, provenance={})


def broken(table, edit):
    data = json.loads(table.to_json())
    edit(data)
    return data


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("schema", lambda d: d.update(schema="fluidsched.policy/2")),
        ("schema", lambda d: d.pop("schema")),
        ("freeze", lambda d: d.pop("freeze")),
        ("freeze", lambda d: d.update(freeze=1)),
        ("colour", lambda d: d.update(colour="blue")),
        ("types", lambda d: d.update(types=[])),
        ("types", lambda d: d.update(types="short")),
        ("types[0]", lambda d: d.update(types=["short"])),
        ("types[1].threshold", lambda d: d["types"][1].update(threshold=-1)),
        ("types[1].threshold", lambda d: d["types"][1].update(threshold=1.5)),
        ("types[1].threshold", lambda d: d["types"][1].update(threshold="inf")),
        ("types[1].threshold", lambda d: d["types"][1].update(threshold=None)),
        ("types[1].threshold", lambda d: d["types"][1].pop("threshold")),
        ("types[0].gate", lambda d: d["types"][0].update(gate=4)),
        ("types[0].gate", lambda d: d["types"][0].update(gate=0)),
        ("types[0].period", lambda d: d["types"][0].update(period=3)),
        ("types[0].max_hold_s", lambda d: d["types"][0].update(max_hold_s=0.0)),
        ("types[0].name", lambda d: d["types"][0].update(name="")),
        ("types[1].name", lambda d: d["types"][1].update(name="short")),
        ("types[0].arrival_rate", lambda d: d["types"][0].update(arrival_rate="inf")),
        ("types[0].admitted_rate", lambda d: d["types"][0].update(admitted_rate=5.0)),
        ("types[0].match.prompt", lambda d: d["types"][0]["match"].update(prompt=[1])),
        ("types[0].match.prompt[1]", lambda d: d["types"][0]["match"].update(prompt=[7, 3])),
        ("types[0].match.label", lambda d: d["types"][0]["match"].pop("label")),
        ("types[0].speed", lambda d: d["types"][0].update(speed=1)),
        ("kind", lambda d: d.update(kind="waiting")),
        ("block_iterations", lambda d: d.update(block_iterations=0)),
        ("block_iterations", lambda d: d.update(block_iterations=None)),
        ("token_budget", lambda d: d.update(token_budget=512)),
        ("segments", lambda d: d.update(segments=[{"boundary": 1, "threshold": 1, "buffer": 0}])),
        ("watermark", lambda d: d.update(watermark=1.0)),
        ("kv_limit_tokens", lambda d: d.update(kv_limit_tokens=0)),
        ("lookahead.headroom_tokens", lambda d: d["lookahead"].update(headroom_tokens=3)),
        (
            "lookahead",
            lambda d: d.update(lookahead={"mode": "known", "headroom_tokens": 3, "lengths": []}),
        ),
        ("lookahead.mode", lambda d: d.update(lookahead={"headroom_tokens": 3, "lengths": []})),
        ("order", lambda d: d.update(order="lifo")),
        ("predictor", lambda d: d.update(predictor="oracle")),
        ("preemption", lambda d: d.update(preemption="drop")),
        ("certificate", lambda d: d.update(certificate=None)),
    ],
)
def test_reading_names_the_field_that_is_wrong(field, edit):
    with pytest.raises(InputError) as caught:
        PolicyTable.from_dict(broken(WAIT, edit))
    assert caught.value.argument == field


def test_nan_in_a_file_is_refused(tmp_path):
    (tmp_path / "p.json").write_text(WAIT.to_json().replace("2.5", "NaN"))
    with pytest.raises(InputError, match="NaN"):
        PolicyTable.from_json(tmp_path / "p.json")


def test_nested_rows_repeat_the_first_segment():
    with pytest.raises(InputError, match="segment 1's"):
        dataclasses.replace(NESTED, types=(TableType("*", threshold=9, gate=9),))
    with pytest.raises(InputError, match="above the one before, 19"):
        dataclasses.replace(NESTED, segments=(Segment(19, 10), Segment(19, 4)))
    with pytest.raises(InputError, match="one less than a multiple of block_iterations, 2"):
        dataclasses.replace(NESTED, segments=(Segment(19, 10), Segment(20, 4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("short,", "short,,"), "another length"),
        (("1,100,", "1,hundred,"), "prompt"),
        (("type,long", "kind,long"), "row"),
        (("3,3,", "-3,3,"), "threshold"),
        (("gate,", "gates,"), "column 'gate' missing"),
        (("true,true,", "maybe,true,"), "freeze"),
    ],
)
def test_csv_edited_wrongly_is_refused_with_its_place(tmp_path, change, said):
    text = WAIT.to_csv()
    edited = text.replace(*change, 1)
    if said == "freeze":
        edited = text.replace("wait,8,true", "wait,8,maybe")
    assert edited != text
    (tmp_path / "p.csv").write_text(edited)
    with pytest.raises(InputError, match=said):
        PolicyTable.from_csv(tmp_path / "p.csv")


def test_csv_globals_must_agree(tmp_path):
    head, one, two = WAIT.to_csv().strip().split("\n")
    (tmp_path / "p.csv").write_text("\n".join([head, one, two.replace("wait,8,", "wait,9,")]))
    with pytest.raises(InputError, match=r"line 3, block_iterations"):
        PolicyTable.from_csv(tmp_path / "p.csv")


def test_first_matching_row_wins_and_none_is_an_error():
    """Closed intervals, first row that holds; a request that matches none is named."""
    path = a_path([1, 100, 101, 900], [50, 1, 51, 1000])
    np.testing.assert_array_equal(WAIT.classify(path), [0, 0, 1, 1])
    with pytest.raises(InputError, match=r"request 1 must match a type .* got prompt 100, output 51"):
        WAIT.classify(a_path([1, 100], [50, 51]))


def test_output_match_needs_predictions_or_the_exact_predictor():
    blind = dataclasses.replace(WAIT, predictor=None)
    with pytest.raises(InputError, match="predicted_output_tokens"):
        blind.classify(a_path([1], [1]))
    path = a_path([50, 500], [1000, 1], predicted=[10, 100])
    np.testing.assert_array_equal(blind.classify(path), [0, 1])


def test_labels():
    np.testing.assert_array_equal(
        GATED.classify(a_path([1, 2], [1, 2], type_index=[1, 1], names=("b", "a"))), [0, 0]
    )
    with pytest.raises(InputError, match=r"request 1 .*type 'b'"):
        GATED.classify(a_path([1, 2], [1, 2], type_index=[1, 0], names=("b", "a")))
    with pytest.raises(InputError, match="by label"):
        GATED.classify(a_path([1], [1]))
    assert baselines.vllm().classify(a_path([], [])).shape == (0,)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=30), st.data())
def test_classify_is_the_first_match(requests, data):
    """The vectorised form equals the definition, request by request."""
    interval = st.tuples(st.integers(0, 200), st.integers(0, 200) | st.none()).map(
        lambda x: (x[0], None if x[1] is None else x[0] + x[1])
    )
    rows = [*data.draw(st.lists(st.tuples(interval, interval | st.none()), max_size=6)), ((0, None), None)]
    table = PolicyTable(
        "t",
        "gated",
        [TableType(str(i), Match(p, o), threshold=1, period=1) for i, (p, o) in enumerate(rows)],
        predictor="exact",
    )

    def holds(interval, tokens):
        return interval is None or (interval[0] <= tokens and (interval[1] is None or tokens <= interval[1]))

    def first(prompt, output):
        return next(i for i, (p, o) in enumerate(rows) if holds(p, prompt) and holds(o, output))

    got = table.classify(a_path(*zip(*requests, strict=True)))
    assert got.tolist() == [first(*r) for r in requests]


def test_prints_in_a_terminal_and_in_a_notebook():
    assert repr(WAIT).splitlines()[0] == "PolicyTable 'wait': kind wait, 2 types, blocks of 8 iterations"
    assert "prompt 1–100, output 1–50" in repr(WAIT)
    assert "segment 2: up to 39 iterations done, threshold 4, buffer 12.2" in repr(NESTED)
    assert "<table" in WAIT._repr_html_()
    frame = WAIT.to_frame()
    assert list(frame.index) == ["short", "long"]
    assert frame.loc["short", "threshold"] == 3


def test_thresholds_and_renamed():
    np.testing.assert_array_equal(WAIT.thresholds, [3, 0])
    assert not WAIT.thresholds.flags.writeable
    assert WAIT.renamed("w1").name == "w1"
    with pytest.raises(InputError, match="without one"):
        _ = baselines.vllm().thresholds


def test_baselines_and_their_defaults():
    vllm, sarathi = baselines.vllm(), baselines.sarathi()
    assert (vllm.token_budget, vllm.watermark, vllm.whole_prompt_admission) == (2048, 0.0, True)
    assert sarathi.token_budget == 512
    assert baselines.orca(10).lookahead == Lookahead("reserve", 10.0)
    for table in (vllm, sarathi, baselines.orca(10)):
        assert table.types == (TableType("*"),)
    with pytest.raises(InputError, match="max_output_tokens"):
        baselines.orca(0)


def test_a_newer_schema_is_told_from_no_schema():
    """A table of version 2 asks for an upgrade; one without a schema is no table."""
    data = baselines.vllm().to_dict()
    for schema, message in (
        ("fluidsched.policy/2", "newer version of fluidsched"),
        ("x/1", "no policy table"),
    ):
        with pytest.raises(InputError, match=message):
            PolicyTable.from_dict({**data, "schema": schema})
