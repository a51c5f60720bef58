"""Exports: engine arguments say what they lose; the shipped JSON Schema agrees with the reader."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.policy import Match, PolicyTable, Segment, TableType, baselines
from fluidsched.policy.table import KINDS

WAIT = PolicyTable(
    "wait",
    "wait",
    [TableType("a", Match((1, None), (1, 9)), 1.0, 0.5, threshold=2, gate=2, max_hold_s=1.0, priority=0.5)],
    block_iterations=8,
    freeze=True,
)
GATED = PolicyTable(
    "gated",
    "gated",
    [TableType("a", Match(label="a"), threshold=2, period=3)],
    kv_limit_tokens=1000,
    preemption="restart",
    order="shortest_first",
)
NESTED = PolicyTable(
    "nested",
    "nested-wait",
    [TableType("*", threshold=4, gate=4)],
    [Segment(3, 4), Segment(7, 2, 1.5)],
    block_iterations=1,
    freeze=True,
)
CAPPED = PolicyTable("capped", "capped", [TableType("*")], max_in_service=86, token_budget=2048)
TABLES = [WAIT, GATED, NESTED, CAPPED, baselines.vllm(), baselines.sarathi(), baselines.orca(100)]


def test_a_cap_loses_nothing_in_vllm():
    export = CAPPED.to_vllm_args()
    assert dict(export.arguments) == {
        "max_num_seqs": 86,
        "max_num_active_seqs": 86,
        "max_num_batched_tokens": 2048,
    }
    assert export.lost == ()
    assert export.command_line() == "--max-num-seqs 86 --max-num-active-seqs 86 --max-num-batched-tokens 2048"


def test_every_stock_knob_of_vllm():
    table = baselines.vllm(
        watermark=0.05, whole_prompt_admission=False, chunk_tokens=256, prefill_interval=4, token_budget=None
    )
    assert dict(table.to_vllm_args().arguments) == {
        "watermark": 0.05,
        "prefill_schedule_interval": 4,
        "long_prefill_token_threshold": 256,
        "scheduler_reserve_full_isl": False,
    }
    assert "--no-scheduler-reserve-full-isl" in table.to_vllm_args().command_line()
    assert len(table.to_sglang_args().lost) == 4


def test_sglang_says_that_its_budget_is_another():
    export = CAPPED.to_sglang_args()
    assert export.arguments["max_running_requests"] == 86
    assert export.arguments["chunked_prefill_size"] == 2048
    assert export.lost == ("The token budget counts prompt tokens; decodes come on top.",)
    assert "--enable-mixed-chunk" in export.command_line()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (WAIT, ["Thresholds, blocks and freezing", "max_hold_s", "Priorities"]),
        (GATED, ["Thresholds per type", "kv_limit_tokens", "shortest_first", "restart"]),
        (NESTED, ["Thresholds, blocks and freezing"]),
        (baselines.orca(100), ["Look-ahead admission (reserve)"]),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)
def test_what_no_stock_engine_does_is_listed(table, words):
    for export in (table.to_vllm_args(), table.to_sglang_args()):
        assert len(export.lost) >= len(words)
        for word in words:
            assert any(word in sentence for sentence in export.lost)


@pytest.fixture(scope="module")
def validator():
    schema = PolicyTable.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.kind)
def test_every_table_satisfies_the_schema(table, validator):
    validator.validate(json.loads(table.to_json()))


def test_compiled_tables_satisfy_the_schema(validator):
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.5, server), server)
    for kind in ("capped", "wait", "gated"):
        validator.validate(json.loads(fs.compile_policy(fluid, kind).to_json()))


def test_schema_lists_the_fields_of_the_table_and_no_others():
    schema = PolicyTable.json_schema()
    data = NESTED.to_dict()
    assert list(schema["properties"]) == schema["required"] == list(data)
    assert list(schema["$defs"]["type"]["properties"]) == list(data["types"][0])
    assert list(schema["$defs"]["type"]["properties"]["match"]["properties"]) == list(
        data["types"][0]["match"]
    )
    assert list(schema["$defs"]["segment"]["properties"]) == list(data["segments"][0])
    assert schema["properties"]["kind"]["enum"] == list(KINDS)


def places(data, path=()):
    """Paths of all fields of a table's dictionary, certificate and provenance apart."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if key in ("certificate", "provenance"):
            continue
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("wrong", [-1, "x", [], {}, True, 0.5], ids=repr)
@pytest.mark.parametrize("table", [WAIT, NESTED, CAPPED], ids=lambda t: t.kind)
def test_what_the_schema_refuses_the_reader_refuses(table, wrong, validator):
    """Any one field replaced by a wrong value: the reader is at least as strict."""
    for path in places(table.to_dict()):
        data = copy.deepcopy(table.to_dict())
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        if not validator.is_valid(json.loads(json.dumps(data))):
            with pytest.raises(InputError):
                PolicyTable.from_dict(data)
