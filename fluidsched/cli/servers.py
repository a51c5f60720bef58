"""Where servers come from: `catalog` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidsched import _files
from fluidsched.cli.inputs import load_server
from fluidsched.cli.options import ForceOption, Shown
from fluidsched.cli.outputs import check_new, emit, write_new
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.server import Server


def catalog(
    shown: Shown,
    gpu: Annotated[str | None, typer.Option(help="Only this GPU.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
) -> None:
    """List the GPUs and models with measured iteration times, their capacity and the errors of their fits.

    Example:

    fluidsched catalog --gpu h100
    """
    from fluidsched.reporting import catalog_text
    from fluidsched.server import catalog as entries

    chosen = [
        entry
        for entry in entries.entries()
        if (gpu is None or entry.gpu == entries.canonical_gpu(gpu))
        and (model is None or entry.model == entries.canonical_model(model))
    ]
    if not chosen:
        known = sorted(
            {entry.model for entry in entries.entries() if gpu and entry.gpu == entries.canonical_gpu(gpu)}
        )
        raise InputError("--model", str(model), f"be one the catalog has on {gpu}: {', '.join(known)}")
    emit(_files.dumps(chosen) if shown.as_json else catalog_text(chosen))


def calibrate(
    shown: Shown,
    points: Annotated[
        Path, typer.Argument(help="CSV or CSV.gz: n_tok, batch_decode, kv_tok, pre_attn, t_s (seconds).")
    ],
    kv_capacity: Annotated[float, typer.Option("--kv-capacity", help="KV tokens that fit in memory.")],
    form: Annotated[str, typer.Option(help="two-piece, affine or paper.")] = "two-piece",
    max_batch_size: Annotated[int | None, typer.Option(help="Most requests in one iteration.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Most tokens in one iteration.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Leave points with more tokens out of the fit.")
    ] = None,
    largest_mean_error: Annotated[
        float, typer.Option(help="Refuse a fit with a larger mean relative error.")
    ] = 0.25,
    largest_extrapolation: Annotated[
        float, typer.Option(help="Refuse limits of the server beyond so many times what was measured.")
    ] = 100.0,
    longest_decode: Annotated[
        float,
        typer.Option(help="Refuse a table whose shortest decode takes longer, s: whole generations do."),
    ] = 0.25,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="GPU:MODEL[:TP]|SPEC",
            help="Refuse times of another order than this server's, such as a100:llama-2-7b.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the server.")] = "server",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the server spec (for --server) to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw measured against fitted times (.png, .pdf, .svg).")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Fit a server's iteration time to measured iterations; a fit that cannot be trusted is refused.

    Example:

    fluidsched calibrate points.csv --kv-capacity 120000 --like a100:llama-2-7b --out server.json
    """
    from fluidsched.server import calibrate as fit

    fitted = fit(
        points,
        form,  # type: ignore[arg-type]  # any other word is refused by calibrate itself
        kv_capacity=kv_capacity,
        max_batch_size=max_batch_size,
        token_budget=token_budget,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        largest_mean_error=largest_mean_error,
        largest_extrapolation=largest_extrapolation,
        longest_decode=longest_decode,
        like=None if like is None else _like(like),
        name=name,
    )
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise InputError("--plot", str(plot), "end in .png, .pdf or .svg")
        check_new("--plot", plot, force)
    if out is not None:
        write_new(out, fitted.server.to_json(), force)
    if plot is not None:
        from matplotlib.figure import Figure

        from fluidsched import plots

        with plots.style():
            figure = Figure(figsize=(3.4, 3.0), layout="constrained")
            plots.calibration(fitted, ax=figure.subplots())
        with _files.whole_file(plot) as temporary:
            figure.savefig(temporary)
    emit(fitted.to_json() if shown.as_json else repr(fitted))


def _like(text: str) -> Server:
    """The server of GPU:MODEL, GPU:MODEL:TP or a spec."""
    if Path(text).suffix.lower() in (".toml", ".json"):
        return load_server(None, None, None, Path(text))
    gpu, _, rest = text.partition(":")
    model, _, degree = rest.partition(":")
    if not model or (degree and not degree.isdecimal()):
        raise InputError("--like", text, "be GPU:MODEL, GPU:MODEL:TP or a spec, such as a100:llama-2-7b")
    try:
        return load_server(gpu, model, int(degree) if degree else None, None)
    except InputError as error:
        named = f"--like {text}: {error.argument}"
        raise InputError(named, error.received, error.required, error.remedy) from None
