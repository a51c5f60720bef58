"""Servers by name: fitted iteration times and KV capacities of GPUs × models × tensor parallelism.

Every entry holds three fits to the same measured or reconstructed iteration times, with their mean and
largest relative errors over the fitted points. With n the tokens in the iteration, K the KV tokens its
decodes read and A the prefill attention work:

- ``"two-piece"`` (the default): g0 + g1·n + g2·max(0, n − knee) + c_kv·K + c_attn·A;
- ``"affine"``: c0 + c_tok·n + c_kv·K, fitted to iterations of at most 512 tokens;
- ``"paper"``: d0 + d1·(KV tokens of the batch), fitted to pure decodes. It has no cost per prefilled token
  and predicts rates far above what real servers reach.

One (GPU, model, tensor parallel) may be known from several sources. Unless told otherwise `server` takes
the first of: aiconfigurator (a current engine, vLLM 0.14), vidur-recon (operator profiles of Vidur),
splitwise (whole iterations of a 2023 engine). KV capacity is 0.9 of the GPUs' memory less the model's fp16
weights.

Names are canonical lower-case words (``"a100-80gb"``, ``"llama-2-7b"``). Case, separators, the
organisation and the suffixes -hf, -chat and -instruct do not matter, so ``"meta-llama/Llama-2-7b-hf"`` is
found too. A plain ``"a100"`` or ``"h100"`` is the 80 GB card.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

from fluidsched import _files
from fluidsched._checks import check_choice, check_count, check_fields
from fluidsched.errors import InputError
from fluidsched.server.iteration import IterationTime
from fluidsched.server.server import Server

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CatalogEntry", "Form", "canonical_gpu", "canonical_model", "entries", "server", "to_frame"]

Form = Literal["two-piece", "affine", "paper"]

#: Limits of every catalog server. Token budgets belong to policy tables.
DEFAULT_MAX_BATCH_SIZE = 256

SCHEMA = "fluidsched.catalog/1"

# Canonical name -> other keys people type, as left by the normalisation below.
_GPUS = {
    "a40": ("a4048gb",),
    "a100-80gb": ("a100", "a10080g"),
    "h100-80gb": ("h100", "h10080g"),
    "h100-80gb-pcap": ("h100pcap", "h100powercapped"),
    "h200": ("h200141gb",),
    "l40s": ("l40s48gb",),
}
_MODELS = {
    "bloom-176b": ("bloom",),
    "codellama-34b": (),
    "internlm-20b": (),
    "llama-2-7b": (),
    "llama-2-70b": (),
    "llama-3-8b": (),
    "llama-3-70b": (),
    "phi-2": (),
    "qwen-72b": (),
    "qwen2.5-7b": (),
    "qwen2.5-32b": (),
    "qwen2.5-72b": (),
}


@dataclass(frozen=True)
class CatalogEntry:
    """One fitted (GPU, model, tensor parallel, source).

    Attributes
    ----------
    gpu, model : str
        Canonical names.
    tensor_parallel : int
        GPUs the model is sharded over; they are one server.
    source : str
        Where the iteration times come from.
    kv_capacity_tokens : int
        KV tokens that fit on all the GPUs together.
    kv_bytes_per_token : int
        Bytes of KV per token, over all the GPUs.
    two_piece : tuple of float
        Arguments of `IterationTime.two_piece`: base, per token, knee, per token beyond, per KV token, per
        unit of prefill attention (s, tokens).
    affine : tuple of float
        Base, per token, per KV token (s), fitted to iterations of at most 512 tokens.
    paper : tuple of float
        d0 and d1 (s, s/token), fitted to pure decodes.
    mean_error, largest_error : dict
        Relative errors of each form over its fitted points.
    licence, citation : str
        Of the source.
    remark : str
        What to know before trusting the entry; often empty.
    """

    gpu: str
    model: str
    tensor_parallel: int
    source: str
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    two_piece: tuple[float, ...]
    affine: tuple[float, ...]
    paper: tuple[float, ...]
    mean_error: dict[str, float]
    largest_error: dict[str, float]
    licence: str
    citation: str
    remark: str

    def iteration_time(self, form: Form = "two-piece") -> IterationTime:
        """Return the fitted iteration time of this form."""
        check_choice("iteration_time", form, get_args(Form))
        if form == "two-piece":
            return IterationTime.two_piece(*self.two_piece)
        if form == "affine":
            base, per_token, per_kv_token = self.affine
            return IterationTime.affine(base, per_token, per_token, per_kv_token)
        return IterationTime.paper(*self.paper)

    def server(self, iteration_time: Form = "two-piece") -> Server:
        """Return the server with this iteration time: batches of at most 256 requests, no token budget."""
        fitted = self.iteration_time(iteration_time)
        mean, largest = self.mean_error[iteration_time], self.largest_error[iteration_time]
        remark = f"; {self.remark}" if self.remark else ""
        return Server(
            self.kv_capacity_tokens,
            fitted,
            max_batch_size=DEFAULT_MAX_BATCH_SIZE,
            name=f"{self.model} on {self.gpu}, tensor parallel {self.tensor_parallel} ({self.source})",
            source=f"{self.source} ({self.licence}), {iteration_time} fit, "
            f"mean error {mean:.1%}, largest {largest:.0%}{remark}",
        )


def canonical_gpu(name: str) -> str:
    """Return the catalog's name of a GPU.

    Raises
    ------
    InputError
        If the catalog does not have it; the message suggests the nearest names.

    Examples
    --------
    >>> canonical_gpu("NVIDIA A100-SXM4-80GB")
    'a100-80gb'
    """
    return _canonical("gpu", name, _GPUS, _gpu_key)


def canonical_model(name: str) -> str:
    """Return the catalog's name of a model.

    Raises
    ------
    InputError
        If the catalog does not have it; the message suggests the nearest names.

    Examples
    --------
    >>> canonical_model("meta-llama/Meta-Llama-3-8B-Instruct")
    'llama-3-8b'
    """
    return _canonical("model", name, _MODELS, _model_key)


def entries() -> tuple[CatalogEntry, ...]:
    """Return every entry, ordered by GPU, model, tensor parallel and preference of source.

    Examples
    --------
    >>> len(entries())
    153
    """
    return _catalog()


def server(
    gpu: str,
    model: str,
    tensor_parallel: int = 1,
    source: str | None = None,
    iteration_time: Form = "two-piece",
) -> Server:
    """Return the server of this name.

    Parameters
    ----------
    gpu, model : str
        Canonical names or aliases.
    tensor_parallel : int
        GPUs the model is sharded over.
    source : str, optional
        "aiconfigurator", "vidur-recon" or "splitwise" (or the full name in the catalog). Default: the first
        of these that has the combination.
    iteration_time : {"two-piece", "affine", "paper"}
        Which of the fits to use.

    Raises
    ------
    InputError
        If nothing has that name; the message says what exists.

    Examples
    --------
    >>> server("a100", "Llama-2-7b-hf").kv_capacity
    121728.0
    """
    gpu, model = canonical_gpu(gpu), canonical_model(model)
    tensor_parallel = check_count("tensor_parallel", tensor_parallel, minimum=1)
    check_choice("iteration_time", iteration_time, get_args(Form))
    found = [e for e in _catalog() if e.gpu == gpu]
    found = _narrow(found, "model", model, f"be one the catalog has on {gpu}")
    if source is not None:
        names = {e.source for e in _catalog()}
        source = next((n for n in names if n == source or n.startswith(f"{source}-")), source)
        found = _narrow(found, "source", source, f"be one that has {model} on {gpu}")
    found = _narrow(found, "tensor_parallel", tensor_parallel, f"be one the catalog has for {model} on {gpu}")
    return found[0].server(iteration_time)


def to_frame() -> pd.DataFrame:
    """Return the catalog as a frame, one row per entry, units in the column names."""
    import pandas as pd

    rows = []
    for entry in _catalog():
        base, per_token, knee, beyond, per_kv, per_attention = entry.two_piece
        row: dict[str, Any] = {
            "gpu": entry.gpu,
            "model": entry.model,
            "tensor_parallel": entry.tensor_parallel,
            "source": entry.source,
            "kv_capacity_tokens": entry.kv_capacity_tokens,
            "kv_bytes_per_token": entry.kv_bytes_per_token,
            "base_s": base,
            "per_token_s": per_token,
            "knee_tokens": knee,
            "per_token_beyond_s": beyond,
            "per_kv_token_s": per_kv,
            "per_prefill_attention_s": per_attention,
        }
        for form in get_args(Form):
            row[f"mean_error_{form}"] = entry.mean_error[form]
            row[f"largest_error_{form}"] = entry.largest_error[form]
        row["licence"] = entry.licence
        row["remark"] = entry.remark
        rows.append(row)
    return pd.DataFrame(rows)


def _narrow(found: list[CatalogEntry], field: str, wanted: str | int, required: str) -> list[CatalogEntry]:
    kept = [entry for entry in found if getattr(entry, field) == wanted]
    if not kept:
        known = ", ".join(str(value) for value in dict.fromkeys(getattr(entry, field) for entry in found))
        raise InputError(field, wanted, f"{required}: {known}")
    return kept


def _canonical(argument: str, name: str, known: dict[str, tuple[str, ...]], key: Callable[[str], str]) -> str:
    if not isinstance(name, str):
        raise InputError(argument, name, "be a name")
    keys = {k: canonical for canonical, others in known.items() for k in (key(canonical), *others)}
    wanted = key(name)
    if wanted in keys:
        return keys[wanted]
    near = dict.fromkeys(keys[k] for k in get_close_matches(wanted, keys, n=3, cutoff=0.6))
    hint = f"Did you mean {_either(near)}?" if near else ""
    raise InputError(argument, name, "be in the catalog, which has " + ", ".join(known), hint)


def _either(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _gpu_key(name: str) -> str:
    word = re.sub(r"nvidia|tensor core|gpu|sxm\d?|hbm\d?e?", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "", word)


def _model_key(name: str) -> str:
    word = re.sub(r"(-hf|-chat|-instruct)+$", "", name.lower().rpartition("/")[2])
    return re.sub(r"[-_\s]+", "", word.removeprefix("meta-"))


@functools.cache
def _catalog() -> tuple[CatalogEntry, ...]:
    text = importlib.resources.files(__package__).joinpath("catalog.json").read_text(encoding="utf-8")
    sources, columns, rows = check_fields(
        "catalog", _files.loads("catalog", text), SCHEMA, ("sources", "columns", "entries")
    )
    about = {source["name"]: source for source in sources}
    return tuple(_entry(dict(zip(columns, row, strict=True)), about) for row in rows)


def _entry(row: dict[str, Any], about: dict[str, dict[str, str]]) -> CatalogEntry:
    return CatalogEntry(
        gpu=row["gpu"],
        model=row["model"],
        tensor_parallel=row["tensor_parallel"],
        source=row["source"],
        kv_capacity_tokens=row["kv_capacity_tokens"],
        kv_bytes_per_token=row["kv_bytes_per_token"],
        two_piece=tuple(row["two_piece"]),
        affine=tuple(row["affine"]),
        paper=tuple(row["paper"]),
        mean_error=dict(zip(get_args(Form), row["mean_error"], strict=True)),
        largest_error=dict(zip(get_args(Form), row["largest_error"], strict=True)),
        licence=about[row["source"]]["licence"],
        citation=about[row["source"]]["citation"],
        remark=row["remark"],
    )
