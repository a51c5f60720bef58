"""Calibration: known coefficients come back, published fits are reproduced, bad tables are refused with the reason."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.errors import InputError
from fluidsched.server import Calibration, IterationTime

TRUE = IterationTime.two_piece(0.01, 1.5e-5, 200.0, 4e-5, 3e-7, 3e-9)
DECODES = [(b, b, b * kv, 0.0) for b in (1, 4, 16, 64, 256) for kv in (64, 512, 2048)]
PREFILLS = [(c, 0, 0, c * (d + c / 2)) for c in (32, 128, 512, 2048) for d in (0, 1024)]
MIXED = [(b + c, b, b * 700, c * c / 2) for b in (8, 32) for c in (64, 256, 1024)]


def table(
    iteration_time: IterationTime = TRUE, batches: list[tuple[float, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Points on a grid of made-up batches, timed exactly by `iteration_time`."""
    tokens, decodes, kv, work = np.array(batches or DECODES + PREFILLS + MIXED, dtype=float).T
    time = iteration_time(tokens - decodes, decodes, kv, work)
    return {"n_tok": tokens, "batch_decode": decodes, "kv_tok": kv, "pre_attn": work, "t_s": time}


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> Path:
    rows = zip(*columns.values(), strict=True)
    text = "\n".join([",".join(columns), *(",".join(repr(float(x)) for x in row) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


class TestRecovery:
    def test_two_piece(self) -> None:
        """Exact times of a two-piece law give back its knee and all coefficients."""
        fitted = fs.calibrate(table(), kv_capacity=1e5)
        assert fitted.knee_tokens == pytest.approx(200.0, rel=1e-4)
        np.testing.assert_allclose(fitted.iteration_time.coefficients, TRUE.coefficients, rtol=1e-4)
        assert fitted.largest_error < 1e-5
        assert fitted.r_squared == pytest.approx(1.0)

    def test_fixed_knee(self) -> None:
        """With the knee given, the coefficients come back to rounding."""
        fitted = fs.calibrate(table(), kv_capacity=1e5, knee_tokens=200)
        np.testing.assert_allclose(fitted.iteration_time.coefficients, TRUE.coefficients, rtol=1e-9)

    @pytest.mark.parametrize(
        ("form", "law"),
        [
            ("affine", IterationTime.affine(0.02, 3e-5, 3e-5, 2e-7)),
            ("paper", IterationTime.paper(0.01, 3e-7)),
        ],
    )
    def test_one_piece(self, form: str, law: IterationTime) -> None:
        """Exact times of the affine and the paper's law give back their coefficients."""
        fitted = fs.calibrate(table(law), form, kv_capacity=1e5)
        np.testing.assert_allclose(fitted.iteration_time.coefficients, law.coefficients, rtol=1e-9)
        assert fitted.knee_tokens is None

    def test_restricted_range(self) -> None:
        """Below the knee the two-piece law is affine, and points beyond take no part in the fit."""
        law = IterationTime.two_piece(0.01, 1.5e-5, 200.0, 4e-5, 3e-7)
        fitted = fs.calibrate(table(law), "affine", kv_capacity=1e5, max_batch_tokens=200)
        np.testing.assert_allclose(fitted.iteration_time.coefficients, law.coefficients[:1], rtol=1e-9)
        assert fitted.measured_range["batch_tokens"][1] <= 200
        assert not fitted.is_fitted.all()

    @given(scale=st.floats(0.05, 5.0), seed=st.integers(0, 1000))
    def test_laws(self, scale: float, seed: int) -> None:
        """Times in other units scale the coefficients and leave the errors; the order of rows means nothing."""
        rng = np.random.default_rng(seed)
        columns = table()
        columns["t_s"] = columns["t_s"] * rng.uniform(0.9, 1.1, columns["t_s"].size)
        order = rng.permutation(columns["t_s"].size)
        other = {name: values[order] for name, values in columns.items()}
        other["t_s"] = other["t_s"] * scale
        first = fs.calibrate(columns, kv_capacity=1e5, knee_tokens=200)
        second = fs.calibrate(other, kv_capacity=1e5, knee_tokens=200)
        np.testing.assert_allclose(
            second.iteration_time.coefficients,
            scale * first.iteration_time.coefficients,
            rtol=1e-7,
            atol=1e-16,
        )
        assert second.mean_error == pytest.approx(first.mean_error, rel=1e-7)
        np.testing.assert_allclose(second.relative_error, first.relative_error[order], atol=1e-9)

    def test_searched_knee_is_no_worse_than_any_fixed_one(self) -> None:
        """The search ends at a squared error no fixed knee on a fine grid goes below."""
        columns = table()
        columns["t_s"] = columns["t_s"] * np.random.default_rng(3).uniform(0.9, 1.1, columns["t_s"].size)
        found = float((fs.calibrate(columns, kv_capacity=1e5).relative_error ** 2).sum())
        fixed = [
            float((fs.calibrate(columns, kv_capacity=1e5, knee_tokens=m).relative_error ** 2).sum())
            for m in np.geomspace(10, 1000, 60)
        ]
        assert found <= min(fixed) * (1 + 1e-6)


PROFILES = [
    ("aiconfigurator-vllm0.14.0", "a100", "meta-llama/Llama-2-7b-hf", 1, "aic_a100_llama-2-7b_tp1"),
    ("vidur-recon", "a100", "meta-llama/Llama-2-7b-hf", 1, "vidur_a100_llama-2-7b_tp1"),
    ("vidur-recon", "a100", "Qwen/Qwen-72B", 2, "vidur_a100_qwen-72b_tp2"),  # two minima in the knee
    ("vidur-recon", "a100", "meta-llama/Llama-2-7b-hf", 8, "vidur_a100_llama-2-7b_tp8"),
]


@pytest.mark.data
@pytest.mark.parametrize(("source", "gpu", "model", "degree", "file"), PROFILES)
class TestPublishedFits:
    """Fits of the same points by others: coefficients to 1e-5 (they are rounded to six digits), errors to 1e-6.

    What differs: their knee comes from a fixed list of token counts, ours is searched.
    """

    @pytest.fixture
    def row(self, data_root: Path, source: str, gpu: str, model: str, degree: int) -> dict[str, str]:
        with open(data_root / "profiles.csv", newline="") as stream:
            (row,) = (
                r
                for r in csv.DictReader(stream)
                if (r["source"], r["gpu"], r["model"], r["tp"]) == (source, gpu, model, str(degree))
            )
        return row

    def test_two_piece(self, data_root: Path, row: dict[str, str], file: str) -> None:
        """At their knee the fit is theirs; the searched knee's squared error is no larger."""
        path = data_root / "profile_points" / f"{file}.csv.gz"
        fitted = fs.calibrate(path, kv_capacity=1e5, knee_tokens=float(row["pw_nb"]))
        theirs = IterationTime.two_piece(
            *(float(row[k]) for k in ("pw_g0_s", "pw_g1_s", "pw_nb", "pw_g2_s", "pw_c_kv_s", "pw_c_pre_s"))
        )
        np.testing.assert_allclose(
            fitted.iteration_time.coefficients, theirs.coefficients, rtol=2e-5, atol=1e-15
        )
        assert fitted.mean_error == pytest.approx(float(row["pw_mre"]), abs=1e-6)
        assert fitted.largest_error == pytest.approx(float(row["pw_maxre"]), abs=1e-6)
        assert fitted.r_squared == pytest.approx(float(row["pw_r2"]), abs=1e-6)
        searched = fs.calibrate(path, kv_capacity=1e5)
        assert (searched.relative_error**2).sum() <= (fitted.relative_error**2).sum() * (1 + 1e-9)

    def test_affine_and_paper(self, data_root: Path, row: dict[str, str], file: str) -> None:
        """The affine fit up to 512 tokens and the paper's on pure decodes are theirs too."""
        path = data_root / "profile_points" / f"{file}.csv.gz"
        affine = fs.calibrate(path, "affine", kv_capacity=1e5, max_batch_tokens=512)
        paper = fs.calibrate(path, "paper", kv_capacity=1e5, largest_mean_error=1.0)
        base, token, kv = (float(row[k]) for k in ("b512_c0_s", "b512_c_tok_s", "b512_c_kv_s"))
        for fitted, theirs, mean in (
            (affine, IterationTime.affine(base, token, token, kv), "b512_mre"),
            (paper, IterationTime.paper(float(row["d0_s"]), float(row["d1_s"])), "dec2_mre"),
        ):
            np.testing.assert_allclose(fitted.iteration_time.coefficients, theirs.coefficients, rtol=1e-5)
            assert fitted.mean_error == pytest.approx(float(row[mean]), abs=1e-6)


class TestRefusals:
    def refused(self, columns: object, pattern: str, form: str = "two-piece", **options: object) -> None:
        with pytest.raises(InputError, match=pattern):
            fs.calibrate(columns, form, kv_capacity=1e5, **options)  # type: ignore[arg-type]

    def test_times_of_generations(self) -> None:
        """Decodes timed over 200 tokens are far slower than the shortest prefill; alone, slower than any GPU."""
        columns = table()
        decodes = columns["batch_decode"] == columns["n_tok"]
        columns["t_s"] = np.where(decodes, 200 * columns["t_s"], columns["t_s"])
        self.refused(columns, "whole generation")
        alone = table(batches=DECODES)
        alone["t_s"] = 200 * alone["t_s"]
        self.refused(alone, "whole generation or in milliseconds", "paper")
        fitted = fs.calibrate(alone, "paper", kv_capacity=1e5, longest_decode=3.0)  # a machine without a GPU
        assert fitted.mean_error < 0.25
        mixed = table(batches=DECODES + MIXED)
        decodes = mixed["batch_decode"] == mixed["n_tok"]
        mixed["t_s"] = np.where(decodes, 20 * mixed["t_s"], mixed["t_s"])
        self.refused(mixed, "shortest iteration with a prefill", "affine")

    def test_times_of_short_generations_are_seen_beside_a_server_like_the_measured_one(self) -> None:
        """Twenty iterations each are slow for a decode of the catalog, which is a remark, and 20 times like's, which is
        refused; so is a thousandth. Three times like's is another engine."""
        like = fs.Server(100_000, TRUE)
        columns = table(batches=DECODES)
        times = columns["t_s"]
        columns["t_s"] = 20 * times
        assert "of several iterations" in "\n".join(fs.calibrate(columns, "paper", kv_capacity=1e5).remarks)
        self.refused(columns, "times 20 times those of 'server'.*about 20 iterations", "paper", like=like)
        columns["t_s"] = times / 15
        self.refused(columns, "not the time per token", "paper", like=like)
        columns["t_s"] = times / 1000
        self.refused(columns, "or in another unit", "paper")
        columns["t_s"] = 3 * times
        assert fs.calibrate(columns, "paper", kv_capacity=1e5, like=like).mean_error < 0.25

    def test_times_of_generations_of_several_lengths_name_the_column_of_lengths(self) -> None:
        """They fit badly; divided by the lengths they fit, and where the table has none they are suspiciously long."""
        columns = table(batches=DECODES)
        lengths = np.random.default_rng(5).integers(30, 900, len(DECODES)).astype(float)
        columns["t_s"] = columns["t_s"] * lengths
        self.refused(columns, "Half of the decodes take more", "paper", longest_decode=0.6)
        told = {**columns, "row": np.arange(1.0, len(DECODES) + 1), "output_len": lengths}
        self.refused(told, "Divided by the column 'output_len' they are within", "paper", longest_decode=0.6)

    def test_negative_slopes(self) -> None:
        """Times that fall in the KV read, or in the tokens, name the column."""
        columns = table(IterationTime.affine(0.02, 3e-5, 3e-5, 0.0))
        falling = {**columns, "t_s": columns["t_s"] * np.exp(-columns["kv_tok"] / 3e5)}
        self.refused(falling, "kv_tok must give a non-negative per_kv_token", "affine")
        falling = {**columns, "t_s": 0.02 + 1e-7 * columns["kv_tok"] - 2e-6 * columns["n_tok"]}
        self.refused(falling, "n_tok must give a non-negative per_token", "affine")

    def test_too_few_points(self) -> None:
        """Fewer than two points a coefficient are no evidence."""
        self.refused({n: v[:11] for n, v in table().items()}, "at least 12 points")
        self.refused(table(batches=PREFILLS), "at least 4 pure decodes .* got 0 of them", "paper")

    def test_undetermined_coefficients(self) -> None:
        """A column without spread, or that follows from another, names the coefficient."""
        self.refused(table(batches=DECODES), "pre_attn must vary.*per_prefill_attention")
        self.refused(table(batches=PREFILLS), "kv_tok must vary.*per_kv_token", "affine")
        constant = {**table(), "t_s": np.full(len(DECODES + PREFILLS + MIXED), 0.02)}
        self.refused(constant, "t_s must vary")
        tied = [(b, b, 100 * b, 0.0) for b in range(1, 20)]
        self.refused(table(batches=tied), "per_token, per_kv_token that follow from each other", "affine")

    def test_another_law(self) -> None:
        """Random times are described by no form; the error says how badly, and the limit can be raised."""
        columns = table()
        columns["t_s"] = columns["t_s"] * np.exp(
            np.random.default_rng(0).normal(0.0, 0.8, columns["t_s"].size)
        )
        self.refused(columns, "mean error of", "affine")
        assert fs.calibrate(columns, "affine", kv_capacity=1e5, largest_mean_error=9.0).mean_error > 0.25

    def test_extrapolation(self) -> None:
        """A server far larger than what was measured is refused by name; accepted, it is a remark."""
        columns = table()
        most = float(np.max(columns["kv_tok"]))
        with pytest.raises(
            InputError, match=r"kv_capacity must lie within 100 times .*largest_extrapolation"
        ):
            fs.calibrate(columns, kv_capacity=101 * most)
        with pytest.raises(InputError, match="token_budget must lie within 3 times"):
            fs.calibrate(
                columns,
                kv_capacity=most,
                token_budget=4 * int(max(columns["n_tok"])),
                largest_extrapolation=3.0,
            )
        fitted = fs.calibrate(columns, kv_capacity=101 * most, largest_extrapolation=200.0)
        assert any("extrapolated (kv_capacity" in remark for remark in fitted.remarks)

    def test_knee_outside_the_points(self) -> None:
        """A fixed knee needs two token counts on either side, and a form that has one."""
        self.refused(table(), "two measured token counts on either side", knee_tokens=5000)
        self.refused(table(), "has no knee", "affine", knee_tokens=100)

    @pytest.mark.parametrize(
        ("column", "value", "pattern"),
        [
            ("t_s", 0.0, "t_s, row 3 must be positive"),
            ("t_s", np.nan, "t_s, row 3 must be 0 or between"),
            ("n_tok", 1.5, "n_tok, row 3 must be a whole number"),
            ("batch_decode", 0.5, "batch_decode, row 3 must be a whole number"),
            ("batch_decode", 9.0, "batch_decode, row 3 must not exceed n_tok"),
            ("kv_tok", 0.0, "kv_tok, row 3 must be at least one token per decode"),
            ("pre_attn", 5.0, "pre_attn, row 3 must be positive exactly where"),
        ],
    )
    def test_impossible_rows(self, column: str, value: float, pattern: str) -> None:
        """A row that no iteration can have is named."""
        columns = table()
        columns[column] = columns[column].copy()
        columns[column][2] = value
        self.refused(columns, pattern)

    def test_files(self, tmp_path: Path) -> None:
        """Missing files, columns and cells are named; an archive cut short is refused."""
        self.refused(tmp_path / "none.csv", "existing file")
        columns = table()
        self.refused({n: v for n, v in columns.items() if n != "kv_tok"}, "have a column 'kv_tok'")
        path = write_csv(tmp_path / "points.csv.gz", columns)
        path.write_bytes(path.read_bytes()[:100])
        self.refused(path, "gzip-compressed")
        broken = tmp_path / "broken.csv"
        broken.write_text("n_tok,n_tok,batch_decode,kv_tok,pre_attn,t_s\n1,2,1,5,0,0.1\n")
        self.refused(broken, "column 'n_tok' twice")
        broken.write_text("n_tok,batch_decode,kv_tok,pre_attn,t_s\n1,1,5,0,fast\n")
        self.refused(broken, "t_s, row 1 must be a number; got fast")


class TestCalibration:
    def test_remarks(self) -> None:
        """What lies beyond the measured range is said, and so is a missing knee."""
        fitted = fs.calibrate(
            table(IterationTime.affine(0.02, 3e-5, 3e-5, 2e-7)), kv_capacity=1e6, token_budget=8192
        )
        text = "\n".join(fitted.remarks)
        assert "beyond 524,288 KV tokens" in text
        assert "token_budget is 8,192" in text
        within = fs.calibrate(table(), kv_capacity=1e5, max_batch_size=256, token_budget=2048)
        assert within.remarks == ()

    def test_file_frame_arrays_and_json_agree(self, tmp_path: Path) -> None:
        """Every way in gives the same server; JSON brings everything back."""
        columns = table()
        fitted = fs.calibrate(columns, kv_capacity=1e5)
        frame = fitted.to_frame()
        assert list(frame["is_fitted"]) == [True] * len(fitted.points)
        for points in (
            frame,
            write_csv(tmp_path / "p.csv", columns),
            write_csv(tmp_path / "p.csv.gz", columns),
        ):
            assert fs.calibrate(points, kv_capacity=1e5).iteration_time == fitted.iteration_time
        path = tmp_path / "calibration.json"
        fitted.to_json(path)
        again = Calibration.from_json(path)
        assert again.to_dict() == fitted.to_dict()
        assert "mean error" in repr(again)
        with pytest.raises(InputError, match=r"calibration\.form"):
            Calibration.from_dict({**fitted.to_dict(), "form": "cubic"})

    def test_plot(self) -> None:
        """The picture has units on both axes and tells fitted points from the others."""
        pytest.importorskip("matplotlib").use("Agg")
        from matplotlib import pyplot

        axes = fs.plots.calibration(fs.calibrate(table(), "paper", kv_capacity=1e5, largest_mean_error=1.0))
        assert "(s)" in axes.get_xlabel()
        assert "prefill (not fitted)" in axes.get_legend_handles_labels()[1]
        pyplot.close("all")


class TestCommand:
    def test_writes_a_server_spec_other_commands_take(self, tmp_path: Path) -> None:
        """The file written is what `--server` reads; an existing one is kept unless forced."""
        points, out, plot = (
            write_csv(tmp_path / "p.csv", table()),
            tmp_path / "server.json",
            tmp_path / "p.png",
        )
        arguments = ["calibrate", str(points), "--kv-capacity", "100000", "--out", str(out)]
        done = CliRunner().invoke(app, [*arguments, "--plot", str(plot)])
        assert done.exit_code == 0, done.output
        assert "knee at 200 tokens" in done.output
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert fs.Server.from_json(out).kv_capacity == 100_000
        solved = CliRunner().invoke(app, ["solve", "--workload", "azure_conv", "--server", str(out)])
        assert solved.exit_code == 0, solved.output
        assert CliRunner().invoke(app, arguments).exit_code == 2

    def test_json_and_refusal(self, tmp_path: Path) -> None:
        """`--json` is the calibration; a refused fit leaves with status 2 and writes nothing."""
        points = write_csv(tmp_path / "p.csv", table())
        done = CliRunner().invoke(app, ["calibrate", str(points), "--kv-capacity", "100000", "--json"])
        assert json.loads(done.stdout)["schema"] == "fluidsched.calibration/1"
        like = ["calibrate", str(points), "--kv-capacity", "100000", "--like"]
        assert CliRunner().invoke(app, [*like, "a100:llama-2-7b"]).exit_code == 0
        assert CliRunner().invoke(app, [*like, "a100"]).exit_code == 2
        decodes = write_csv(tmp_path / "d.csv", table(batches=DECODES))
        out = tmp_path / "server.json"
        done = CliRunner().invoke(app, ["calibrate", str(decodes), "--kv-capacity", "1e5", "--out", str(out)])
        assert done.exit_code == 2
        assert not out.exists()


HEAD = "n_tok,batch_decode,kv_tok,pre_attn,t_s\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "", "have a header and at least one row"),
        ("p.csv", HEAD, "have a header and at least one row"),
        ("p.csv", HEAD + "1,1,5,0\n", "row 1 must have 5 fields; got 4 fields"),
        ("p.csv", HEAD + '1,1,5,0,"0.1\n', "be valid CSV"),
        ("p.csv", HEAD + "1,1,5,0,fast\n", "t_s, row 1 must be a number; got fast"),
        ("p.csv.gz", "not compressed", "be gzip-compressed"),
        ("missing.csv.gz", None, "name an existing file"),
        ("missing.csv", None, "name an existing file"),
    ],
)
def test_damaged_tables_of_points_are_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    """What is no table of points: the row, the line or the file."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        fs.calibrate(tmp_path / name, kv_capacity=1e5)


def test_points_are_columns_of_one_length() -> None:
    """Neither a number, nor a matrix, nor columns that differ."""
    good = table()
    for points, message in (
        (3, "points must be a CSV file, a frame, or arrays"),
        (good | {"t_s": good["t_s"][:-1]}, "t_s must have 29 rows"),
        (good | {"n_tok": good["n_tok"][None]}, "n_tok must be one column"),
        (good | {"n_tok": [[1], [1, 2]]}, "n_tok"),
    ):
        with pytest.raises(InputError, match=message):
            fs.calibrate(points, kv_capacity=1e5)  # type: ignore[arg-type]


def test_a_calibration_of_no_point_of_its_form_is_refused() -> None:
    """A file may not say it was fitted to decodes where its points are prefills."""
    data = json.loads(fs.calibrate(table(), kv_capacity=1e5).to_json())
    for change, message in (
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a whole number of at least 1"),
        ({"max_batch_tokens": None, "form": "cubic"}, "form must be"),
    ):
        with pytest.raises(InputError, match=message):
            Calibration.from_dict(data | change)
    prefills = {name: [x for x, d in zip(column, data["points"]["batch_decode"], strict=True) if d == 0]
                for name, column in data["points"].items()}  # fmt: skip
    with pytest.raises(InputError, match="hold a point of the form 'paper'"):
        Calibration.from_dict(data | {"form": "paper", "points": prefills, "max_batch_tokens": None})
