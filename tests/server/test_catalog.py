"""The catalog: names, preference of source, what the fits are, and that the file is what the script makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fluidsched.errors import InputError
from fluidsched.server import catalog

ROOT = Path(__file__).resolve().parents[2]


def test_every_profile_is_there() -> None:
    """153 combinations, each known once per source, all with capacity, coefficients and errors."""
    entries = catalog.entries()
    assert len(entries) == 153
    assert len({(e.gpu, e.model, e.tensor_parallel, e.source) for e in entries}) == 153
    for entry in entries:
        assert entry.kv_capacity_tokens > 0
        assert entry.licence in ("MIT", "Apache-2.0")
        for form in get_args(catalog.Form):
            assert entry.server(form).iteration_time.empty > 0
            assert 0 < entry.mean_error[form] <= entry.largest_error[form] < 1


def test_negative_bases_and_median_errors_are_as_stated() -> None:
    """25 of 153 second pieces start below zero; median errors 3 % (14 %), 4 % (16 %), 9 % (43 %)."""
    entries = catalog.entries()
    second_bases = [e.two_piece[0] - e.two_piece[3] * e.two_piece[2] for e in entries]
    assert sum(base < 0 for base in second_bases) == 25
    for form, mean, largest in [
        ("two-piece", 0.032, 0.138),
        ("affine", 0.040, 0.159),
        ("paper", 0.093, 0.426),
    ]:
        assert np.median([e.mean_error[form] for e in entries]) == pytest.approx(mean, abs=5e-4)
        assert np.median([e.largest_error[form] for e in entries]) == pytest.approx(largest, abs=5e-4)


def test_recomputing_never_costs_less_than_the_decodes_it_replaces() -> None:
    """What the fluid bound needs of every fit: c_pf·L + c_attn·L²/2 ≥ c_dec + c_kv·L for L ≥ 2 tokens."""
    lengths = np.geomspace(2, 1e5, 200)
    for entry in catalog.entries():
        coefficients = entry.iteration_time().coefficients
        assert coefficients is not None
        _, c_pf, c_dec, c_kv, c_attn = coefficients.T[:, :, None]
        assert np.all(c_pf * lengths + c_attn * lengths**2 / 2 >= c_dec + c_kv * lengths), entry


@pytest.mark.parametrize(
    ("gpu", "model"),
    [
        ("a100-80gb", "llama-2-7b"),
        ("A100", "Llama-2-7B"),
        ("a100", "llama2-7b"),
        ("NVIDIA A100-SXM4-80GB", "meta-llama/Llama-2-7b-hf"),
        ("a100_sxm", "meta-llama/Llama-2-7b-chat-hf"),
        ("A100 80GB", "llama_2_7b"),
    ],
)
def test_aliases_find_the_default_server(gpu: str, model: str) -> None:
    """What people type leads to the same server, from the preferred source."""
    server = catalog.server(gpu, model, tensor_parallel=1)
    assert server.kv_capacity == 121_728
    assert server.name == "llama-2-7b on a100-80gb, tensor parallel 1 (aiconfigurator-vllm0.14.0)"
    assert (server.max_batch_size, server.token_budget, server.block_size) == (256, None, None)


def test_the_a100_is_the_80_gb_card() -> None:
    """0.9 · 80 GiB less the fp16 weights of Llama-2-7B's layers (12.952 GB) over 524 288 B per token."""
    (entry,) = [
        e
        for e in catalog.entries()
        if (e.gpu, e.model, e.tensor_parallel, e.source) == ("a100-80gb", "llama-2-7b", 1, "vidur-recon")
    ]
    assert entry.kv_bytes_per_token == 2 * 32 * 4096 * 2
    assert entry.kv_capacity_tokens == 122_752
    assert entry.kv_capacity_tokens * entry.kv_bytes_per_token == pytest.approx(
        0.9 * 80 * 2**30 - 12.952e9, rel=1e-4
    )


def test_sources_by_preference_and_by_name() -> None:
    """aiconfigurator, then vidur-recon, then splitwise; a short name is enough."""
    assert "vidur-recon" in catalog.server("a100", "llama-2-70b", 2).name
    assert "splitwise" in catalog.server("a100", "llama2-70b", 2, source="splitwise").name
    assert catalog.server("a100", "llama-2-7b", source="vidur").kv_capacity == 122_752
    assert "vidur-recon" in catalog.server("h100", "phi-2").name
    assert "extrapolated" in catalog.server("a40", "llama-2-7b").source


def test_forms() -> None:
    """Each fit has its shape: two pieces, one with c_pf = c_dec, the paper's row."""
    rows = [
        catalog.server("a100", "llama-2-7b", iteration_time=form).iteration_time.coefficients
        for form in get_args(catalog.Form)
    ]
    two, affine, paper = (row for row in rows if row is not None)
    assert two.shape == (2, 5)
    assert affine.shape == (1, 5)
    assert affine[0, 1] == affine[0, 2]
    assert paper[0, 1] == paper[0, 3]
    assert paper[0, 2] == paper[0, 4] == 0


@pytest.mark.parametrize(
    ("arguments", "named", "hint"),
    [
        (("a100-40gb", "llama-2-7b"), "gpu", "'a100-80gb'"),
        (("tpu", "llama-2-7b"), "gpu", "a100-80gb"),
        ((3, "llama-2-7b"), "gpu", "name"),
        (("a100", "llama-3.1-8b"), "model", "'llama-3-8b'"),
        (("l40s", "bloom"), "model", "llama-2-7b"),
        (("a100", "llama-2-70b", 1), "tensor_parallel", "2, 4, 8"),
        (("a100", "llama-2-7b", 0), "tensor_parallel", "at least 1"),
        (("a100", "llama-2-7b", 1, "splitwise"), "source", "aiconfigurator-vllm0.14.0, vidur-recon"),
        (("a100", "llama-2-7b", 1, None, "two_piece"), "iteration_time", "'two-piece'"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(
    arguments: tuple[Any, ...], named: str, hint: str
) -> None:
    """The error names the argument and what exists near it."""
    with pytest.raises(InputError) as caught:
        catalog.server(*arguments)
    assert caught.value.argument == named
    assert hint in str(caught.value)


def test_frame_has_units_and_all_rows() -> None:
    """One row per entry; the entry's numbers stand in columns that carry their unit."""
    frame = catalog.to_frame()
    assert len(frame) == 153
    assert {"kv_capacity_tokens", "base_s", "mean_error_two-piece", "licence"} <= set(frame.columns)


@pytest.mark.data
def test_the_file_is_what_the_script_makes(data_root: Path, tmp_path: Path) -> None:
    """Running scripts/make_catalog.py on the profiles gives the packaged file, byte for byte."""
    specification = importlib.util.spec_from_file_location("make_catalog", ROOT / "scripts/make_catalog.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    output = tmp_path / "catalog.json"
    assert script.main([str(data_root), str(output)]) == 0
    assert output.read_bytes() == Path(catalog.__file__).with_name("catalog.json").read_bytes()
    assert script.main([]) == 2
