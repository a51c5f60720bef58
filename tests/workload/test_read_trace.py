"""Reading traces: formats, order, and errors that name the line; figures of the real files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InputError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
PLAIN = "arrival_s,prompt_tokens,output_tokens"


def read(tmp_path: Path, text: str, name: str = "trace.csv") -> fs.ArrivalPath:
    file = tmp_path / name
    file.write_bytes(text.encode())
    return fs.read_trace(file)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "newline", "blank lines"])
def test_azure_times_start_at_the_first_arrival(tmp_path: Path, newline: str, end: str) -> None:
    """Seven digits of the second are kept exactly, over midnight too; any line end and file end will do."""
    lines = [AZURE, "2023-11-16 23:59:59.6805900,374,44", "2023-11-17 00:00:00.0000001,396,109"]
    tail = {"": "", "newline": newline, "blank lines": 3 * newline}[end]
    path = read(tmp_path, newline.join(lines) + tail)
    assert path.arrival_s.tolist() == [0.0, 0.3194101]
    assert path.prompt_tokens.tolist() == [374, 396]
    assert path.output_tokens.tolist() == [44, 109]
    assert (path.name, path.horizon, path.type) == ("trace", None, None)


def test_azure_times_in_utc_notation(tmp_path: Path) -> None:
    """Whole seconds, a T, a Z or +00:00 are the same instant; a byte-order mark is no part of the header."""
    rows = ["2024-05-10 00:00:00.5+00:00,1,1", "2024-05-10T00:00:01Z,1,1", "2024-05-10 00:00:02,1,1"]
    path = read(tmp_path, "\ufeff" + "\n".join([AZURE, *rows]))
    assert path.arrival_s.tolist() == [0.0, 0.5, 1.5]


def test_plain_times_are_kept(tmp_path: Path) -> None:
    """Seconds as they stand; columns in any order, others ignored, predictions and labels read."""
    text = "id,output_tokens,arrival_s,type,prompt_tokens,predicted_output_tokens\n"
    path = read(tmp_path, text + "x,7,0.1,chat,5,8\ny,9,1e1,code,6.0,1\n")
    assert path.arrival_s.tolist() == [0.1, 10.0]
    assert path.prompt_tokens.tolist() == [5, 6]
    assert path.output_tokens.tolist() == [7, 9]
    assert path.predicted_output_tokens is not None
    assert path.predicted_output_tokens.tolist() == [8, 1]
    assert [path.label(0), path.label(1)] == ["chat", "code"]


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    """Time stamps in ms become seconds from the trace's own zero; hash_ids are ignored."""
    rows = [
        '{"timestamp": 250, "input_length": 40160, "output_length": 6, "hash_ids": [0, 1]}',
        '{"timestamp": 1000.5, "input_length": 13, "output_length": 1}',
    ]
    path = read(tmp_path, "\n".join(rows), "m.jsonl")
    assert path.arrival_s.tolist() == [0.25, 1.0005]
    assert path.prompt_tokens.tolist() == [40160, 13]


def test_rows_are_sorted_stably_by_time(tmp_path: Path) -> None:
    """Rows out of order are sorted; rows of one instant keep the order of the file."""
    path = read(tmp_path, f"{PLAIN},type\n5,1,1,a\n2,2,2,b\n5,3,3,c\n2,4,4,a\n")
    assert path.prompt_tokens.tolist() == [2, 4, 1, 3]
    assert [path.label(i) for i in range(4)] == ["b", "a", "a", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace.csv must hold a header and at least one request; got an empty file"),
        (" \n\n", "an empty file"),
        (AZURE, "trace.csv must hold at least one request; got a header without rows"),
        (PLAIN + "\r\n\r\n", "a header without rows"),
        ("time,in,out\n1,2,3", "line 1 must be the header TIMESTAMP"),
        (f"\n{PLAIN}\n1,2,3", "line 1 must be the header"),
        ("1.0,5,5\n2.0,5,5", "line 1 must be the header TIMESTAMP"),
        (f"{PLAIN},output_tokens\n1,2,3,4", "line 1 must name each column once"),
        (f"{AZURE}\n2023-11-16 18:15:46,1,1\n2023-11-16,1,1", "line 3 must be a UTC time"),
        (f"{AZURE}\n2023-11-16 18:15:46,1,1\nnow,1,1", "line 3 must be a UTC time"),
        (f"{AZURE}\n2023-02-30 18:15:46,1,1", "line 2 must be a time that exists"),
        (f"{AZURE}\n2023-11-16 18:15:46+02:00,1,1", "line 2 must be a UTC time"),
        (f"{AZURE}\n2023-11-16 18:15:46,1,0", "line 2 must be a whole number of tokens in 1.."),
        (f"{AZURE}\r\n2023-11-16 18:15:46,1,1\r\n2023-11-16 18:15:47,1\r\n", "line 3 must have 3 columns"),
        (f"{PLAIN}\n1,2,3\n\n2,2,3", "line 3 must have 3 columns like the header; got an empty line"),
        (f"{PLAIN}\n1,2,3\nnan,2,3", "line 3 must be a number of seconds, finite"),
        (f"{PLAIN}\ninf,2,3", "line 2 must be a number of seconds, finite"),
        (f"{PLAIN}\n-1,2,3", "line 2 must be a number of seconds, finite and at least 0"),
        (f"{PLAIN}\n,2,3", "line 2 must be a number of seconds"),
        (f"{PLAIN}\n1,2,3\n1,-2,3", "line 3 must be a whole number of tokens"),
        (f"{PLAIN}\n1,NaN,3", "prompt_tokens 'NaN'"),
        (f"{PLAIN}\n1,2.5,3", "prompt_tokens '2.5'"),
        (f"{PLAIN}\n1,1_000,3", "prompt_tokens '1_000'"),
        (f"{PLAIN}\n1_0,1,3", "arrival_s '1_0'"),
        (f"{PLAIN}\n1,{'9' * 5000},3", "be a whole number of tokens"),
        (f"{PLAIN}\n1,²,3", "prompt_tokens '²'"),
        (f"{PLAIN}\n1,99999999999,3", "prompt_tokens '99999999999'"),
        (f"{PLAIN},type\n1,2,3,\n", "line 2 must be a label"),
        (f'{PLAIN}\n1,2,"3', "must be valid CSV"),
        ('{"timestamp": 1, "input_length": 1}', "line 1 must be a JSON object with timestamp"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 0}', "output_length 0"),
        ('{"timestamp": 1, "input_length": 1.5, "output_length": 1}', "input_length 1.5"),
        ('{"timestamp": 1, "input_length": true, "output_length": 1}', "input_length True"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "a number of milliseconds, finite"),
        ('{"timestamp": "1", "input_length": 1, "output_length": 1}', "a number of milliseconds"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[1]', "line 2 must be a JSON object"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{', "line 2 must be one JSON object per"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    """The message names the file, the line and what is required there."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "trace.csv" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that does not exist, or is a folder, or is no text."""
    with pytest.raises(InputError, match="name an existing file"):
        fs.read_trace(tmp_path / "no.csv")
    with pytest.raises(InputError, match="readable file"):
        fs.read_trace(tmp_path)
    (tmp_path / "binary.csv").write_bytes(PLAIN.encode() + b"\n1,2,\xff\xfe\n")
    with pytest.raises(InputError, match="line 2"):
        fs.read_trace(tmp_path / "binary.csv")


def test_reading_and_sampling_import_nothing_heavy(tmp_path: Path) -> None:
    """numpy is enough to read a trace, bin it, write it, and sample a workload."""
    (tmp_path / "t.csv").write_text(f"{PLAIN}\n0,1,2\n1,3,4\n")
    code = (
        "import sys, fluidsched as fs\n"
        "w = fs.read_trace(sys.argv[1]).to_workload(types=1)\n"
        "w.sample(10.0, 1).to_csv(); w.to_json(); fs.workloads.azure_conv()\n"
        "print([m for m in ('pandas', 'scipy', 'numba', 'matplotlib', 'cvxpy', 'pyarrow') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "t.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# file: (requests, rate /s, CV of inter-arrivals, prompt and output mean / p50 / p90 / p99 / max)
REAL = {
    "AzureLLMInferenceTrace_conv.csv": (
        19366,
        5.530,
        1.09,
        (1155, 1020, 2734, 4142, 14050),
        (211, 129, 424, 601, 1000),
    ),
    "AzureLLMInferenceTrace_code.csv": (
        8819,
        2.567,
        13.2,
        (2048, 1469, 5188, 7436, 7437),
        (27.9, 13, 55, 251, 1899),
    ),
    "mooncake_synthetic_trace.jsonl": (
        3993,
        3.907,
        1.01,
        (15325, 11587, 38611, 66456, 191378),
        (149, 69, 389, 768, 893),
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("file", REAL)
def test_figures_of_the_public_traces(data_root: Path, file: str) -> None:
    """Requests, rate N/(last − first arrival), burstiness and quantiles of the published files."""
    requests, rate, cv, prompt, output = REAL[file]
    path = fs.read_trace(data_root / "traces" / file)
    gaps = np.diff(path.arrival_s)
    assert len(path) == requests
    assert path.rate == pytest.approx(rate, abs=5e-4)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=5e-3)
    assert path.arrival_s[0] == 0.0
    for column, expected in ((path.prompt_tokens, prompt), (path.output_tokens, output)):
        figures = [column.mean(), *np.quantile(column, [0.5, 0.9, 0.99]), column.max()]
        np.testing.assert_allclose(figures, expected, rtol=3e-3, atol=0.5)
