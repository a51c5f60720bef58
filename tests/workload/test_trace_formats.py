"""BurstGPT, vLLM results, ShareGPT-style lengths, Parquet: what is read, what is left out, what is refused.

All files here are fixtures made up for these tests in the formats' shape; no row comes from a public trace.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from path_cases import paths

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.workload.traces import is_json_trace

BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"


def read(tmp_path: Path, content: object, name: str = "trace.x") -> fs.ArrivalPath:
    """The path read from text, or from what becomes JSON."""
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return fs.read_trace(file)


def bench(**change: object) -> dict:
    """A made-up result of ``vllm bench serve --save-detailed`` with three requests, one of them failed."""
    result = {
        "date": "20260101-000000",
        "num_prompts": 3,
        "completed": 2,
        "request_throughput": 0.5,
        "input_lens": [30, 20, 10],
        "output_lens": [3, 0, 1],
        "start_times": [1002.5, 0.0, 1000.0],
        "itls": [[0.1, 0.1], [], []],
        "errors": ["", "refused", ""],
    }
    return {key: value for key, value in (result | change).items() if value is not None}


def test_burstgpt_rows_without_a_response_are_failures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Times are seconds, the model is the label, an output of 0 is left out and counted in the log."""
    rows = [
        "7.5,1,2.5,small,100,20,120,API log",
        "5,,1,large,472,0,472,Conversation log",
        "5,2,1.25,large,9,1,10,Conversation log",
    ]
    with caplog.at_level(logging.WARNING):
        path = read(tmp_path, "\n".join([BURST, *rows]))
    assert path.arrival_s.tolist() == [5.0, 7.5]
    assert path.prompt_tokens.tolist() == [9, 100]
    assert path.output_tokens.tolist() == [1, 20]
    assert [path.label(0), path.label(1)] == ["large", "small"]
    assert "1 of 3 requests failed" in caplog.text


def test_burstgpt_of_the_first_release_has_fewer_columns(tmp_path: Path) -> None:
    """Without session and elapsed time, in any order."""
    path = read(tmp_path, "Model,Response tokens,Request tokens,Timestamp\nm,4,3,1\n")
    assert (path.arrival_s.tolist(), path.prompt_tokens.tolist(), path.output_tokens.tolist()) == (
        [1],
        [3],
        [4],
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_vllm_results_start_at_the_first_request(
    tmp_path: Path, indent: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Start times of any clock, in any order, on one line or many; failed requests are left out."""
    with caplog.at_level(logging.WARNING):
        path = read(tmp_path, json.dumps(bench(), indent=indent))
    assert path.arrival_s.tolist() == [0.0, 2.5]
    assert path.prompt_tokens.tolist() == [10, 30]
    assert path.output_tokens.tolist() == [1, 3]
    assert "1 of 3 requests failed" in caplog.text
    assert len(read(tmp_path, bench(errors=None))) == 2
    assert len(read(tmp_path, bench(errors=["", "", "late"]))) == 1


def test_sharegpt_lengths_come_all_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """First turn the prompt, second the answer, further ones ignored, single turns left out."""
    records = [
        {"id": "x", "conversations": [{"from": "human", "value": 12}, {"from": "gpt", "value": 40}]},
        {"conversations": [{"from": "human", "value": 5}]},
        {"conversations": [{"value": 7}, {"value": 8}, {"value": 9}]},
    ]
    with caplog.at_level(logging.WARNING):
        path = read(tmp_path, records)
    assert path.prompt_tokens.tolist() == [12, 7]
    assert path.output_tokens.tolist() == [40, 8]
    assert path.rate == np.inf
    assert "1 of 3 conversations" in caplog.text
    flat = read(
        tmp_path, [{"prompt_tokens": 12, "output_tokens": 40}, {"prompt_tokens": 7, "output_tokens": 8}]
    )
    assert flat == path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{BURST}\n1,1,1,m,5,0,5,x", "hold a request with an answer; got only requests that failed"),
        (f"{BURST}\n1,1,1,m,5,0,5,x\n1,1,1,m,0,5,5,x", "line 3 must be a whole number of tokens"),
        (f"{BURST}\nx,1,1,m,5,5,5,x", "line 2 must be a number of seconds"),
        (f"{BURST}\n1,1,1,,5,5,5,x", "line 2 must be a label; got Model ''"),
        (f"{BURST}\n1,1,1,m,5,5", "line 2 must have 8 columns"),
        (
            bench(input_lens=None),
            "must hold input_lens, output_lens, start_times; got a vLLM bench result without",
        ),
        (bench(start_times=None), "--save-detailed"),
        (bench(input_lens=5), "input_lens must be a list"),
        (bench(errors="none"), "errors must be a list"),
        (bench(input_lens=[1, 2]), "one entry per request in each list; got 2 input_lens, 3 output_lens"),
        (bench(input_lens=[30, 20, 0]), "record 3 must be a whole number of tokens"),
        (bench(output_lens=[3, 0, 1.5]), "record 3 must be a whole number of tokens"),
        (bench(start_times=["1", 0, 1]), "record 1 must be a number of seconds"),
        (bench(start_times=[1, 0, None]), "record 3 must be a number of seconds"),
        (bench(input_lens=[], output_lens=[], start_times=[], errors=[]), "hold at least one request"),
        (bench(output_lens=[0, 0, 0]), "only requests that failed"),
        ('{\n "input_lens": [1,\n}', "line 3 must be valid JSON"),
        ("[]", "hold at least one record; got an empty list"),
        ("[1, 2", "line 1 must be valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ([3], "record 1 must hold prompt_tokens and output_tokens, or"),
        ([{"prompt_tokens": 3}], "record 1 must hold prompt_tokens and output_tokens, or"),
        ([{"conversations": 5}], 'or "conversations"'),
        ([{"conversations": ["a", "b"]}], 'or "conversations"'),
        ([{"conversations": [{"value": 5}]}], "hold a prompt and its answer"),
        ([{"prompt_tokens": 3, "output_tokens": 2, "arrival_s": 1}], "record 1 must hold lengths only"),
        (
            [
                {"conversations": [{"value": 5}, {"value": 6}]},
                {"conversations": [{"value": "Hi"}, {"value": "You"}]},
            ],
            "record 2 must hold the number of tokens",
        ),
        ([{"conversations": [{"value": 5}, {"value": 0}]}], "record 1 must be a whole number of tokens"),
        ([{"conversations": [{"value": 5}, {"from": "gpt"}]}], "output None"),
        ([{"prompt_tokens": 3, "output_tokens": True}], "output True"),
    ],
)
def test_a_bad_file_is_refused_with_its_row(tmp_path: Path, content: object, message: str) -> None:
    """The message names the file, the line or record, and what is required there."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert "trace.x" in str(caught.value)


@given(paths())
def test_parquet_round_trip(tmp_path_factory: pytest.TempPathFactory, path: fs.ArrivalPath) -> None:
    """`to_parquet` then `read_trace` gives what `to_csv` then `read_trace` gives."""
    folder = tmp_path_factory.mktemp("parquet")
    path.to_parquet(folder / "path.parquet")
    path.to_csv(folder / "path.csv")
    assert fs.read_trace(folder / "path.parquet") == fs.read_trace(folder / "path.csv")


def parquet(tmp_path: Path, **columns: list) -> fs.ArrivalPath:
    """The path read from a Parquet file with these columns."""
    given = {"arrival_s": [1.0, 2.0], "prompt_tokens": [5, 6], "output_tokens": [7, 8]} | columns
    table = pyarrow.table({name: column for name, column in given.items() if column is not None})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    return fs.read_trace(tmp_path / "t.parquet")


def test_parquet_is_recognised_by_its_bytes(tmp_path: Path) -> None:
    """Whatever the file is called; whole floats are counts, other columns ignored, rows sorted."""
    path = parquet(tmp_path, arrival_s=[2, 1], prompt_tokens=[5.0, 6.0], note=["a", None])
    assert path.arrival_s.tolist() == [1.0, 2.0]
    assert path.prompt_tokens.tolist() == [6, 5]
    (tmp_path / "t.parquet").rename(tmp_path / "t.csv")
    assert len(fs.read_trace(tmp_path / "t.csv")) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"output_tokens": None}, "hold arrival_s, prompt_tokens, output_tokens; got columns arrival_s"),
        ({"arrival_s": [1.0, None]}, "row 2 must be a number of seconds"),
        (
            {"arrival_s": [1.0, float("nan")]},
            "row 2 must be a number of seconds, finite and at least 0; got arrival_s nan",
        ),
        ({"prompt_tokens": [0, 5]}, "row 1 must be a whole number of tokens"),
        ({"prompt_tokens": [5, None]}, "row 2 must be a whole number of tokens"),
        ({"output_tokens": ["7", "8"]}, "row 1 must be a whole number of tokens"),
        ({"predicted_output_tokens": [1, -1]}, "row 2 must be a whole number of tokens"),
        ({"type": ["a", None]}, "row 2 must be a label"),
        (
            {"arrival_s": [], "prompt_tokens": [], "output_tokens": []},
            "hold at least one request; got no rows",
        ),
    ],
)
def test_a_bad_parquet_file_is_refused_with_its_row(tmp_path: Path, columns: dict, message: str) -> None:
    """The message names the file, the row and what is required there."""
    with pytest.raises(InputError) as caught:
        parquet(tmp_path, **columns)
    assert message in str(caught.value)
    assert "t.parquet" in str(caught.value)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    """Cut off after its first bytes."""
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"cut\.parquet must be a whole Parquet file"):
        fs.read_trace(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and writing name the extra; nothing is written."""
    path = parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"Install fluidsched\[parquet\]"):
        fs.read_trace(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"Install fluidsched\[parquet\]"):
        path.to_parquet(tmp_path / "new.parquet")
    assert not (tmp_path / "new.parquet").exists()


def test_json_traces_are_told_from_workloads(tmp_path: Path) -> None:
    """What the command line needs to know of a JSON file before it reads it."""
    contents = {
        "bench": (bench(), True),
        "lengths": ([{"prompt_tokens": 1, "output_tokens": 1}], True),
        "mooncake": ({"timestamp": 0, "input_length": 1, "output_length": 1}, True),
        "workload": (fs.workloads.azure_conv().to_json(), False),
    }
    for name, (content, expected) in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert is_json_trace(tmp_path / name) is expected
