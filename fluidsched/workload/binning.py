"""Types from a path: bins of (prompt, output) that keep the path's moments exactly.

The N requests are split twice: into `a` groups by prompt length, then each group into `b` bins by its own
output lengths, k = a·b. Boundaries are quantiles of *counts*: groups and bins hold as nearly equal numbers
of requests as ties allow. So types have nearly equal rates, hence thresholds of nearly equal size, which is
where rounding them to integers wastes least, and no type rests on a handful of observations. (Measured on
the two Azure hours, A100 and Llama-2-7B, 12 types: block tables with memory in expectation plus 2.33
standard deviations reach about 0.93 and 0.86 of the fluid boundary with equal counts, 0.83 and 0.53 with
equal KV work per bin.)

A bin is a box [p_lo, p_hi] × [o_lo, o_hi] of closed ranges. The boxes partition [1, ∞) × [1, ∞): the first
range starts at 1, each next one where the last ended, the last is open. So every request, also one never
seen, belongs to exactly one type.

Type j has rate N_j / duration and the empirical joint law of its N_j requests. Any mean over the path is
therefore the rate-weighted mean over the types: Σ_j λ_j E_j[f(p, o)] = rate · (1/N) Σ_n f(p_n, o_n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from fluidsched._checks import check_count
from fluidsched.errors import InputError
from fluidsched.workload.arrivals import superposition
from fluidsched.workload.lengths import IntArray, JointLaw, joint
from fluidsched.workload.model import Range, RequestType, Workload
from fluidsched.workload.path import ArrivalPath

__all__ = ["bin_path", "merge", "merge_sizes"]

WHOLE: Range = (1, None)


def grid(types: int) -> tuple[int, int]:
    """(a, b) with a·b = types, a ≤ b and a as large as possible.

    Examples
    --------
    >>> [grid(k) for k in (1, 4, 6, 7, 12)]
    [(1, 1), (2, 2), (2, 3), (1, 7), (3, 4)]
    """
    a = next(d for d in range(math.isqrt(types), 0, -1) if types % d == 0)
    return a, types // a


def quantile_ranges(values: IntArray, groups: int) -> list[Range] | None:
    """Ranges that partition [1, ∞) and split `values` into non-empty groups of nearly equal counts.

    Each boundary in turn is the distinct value at which the count so far is nearest to its quantile (the
    lower one on a tie), among those that leave at least one distinct value to every group. None if there are
    fewer distinct values than groups.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < groups:
        return None
    cumulative = np.cumsum(counts)
    boundaries: list[int] = []
    first = 0
    for group in range(1, groups):
        last = len(distinct) - (groups - group)
        distance = np.abs(cumulative[first:last] * groups - group * len(values))
        first += int(np.argmin(distance)) + 1
        boundaries.append(int(distinct[first - 1]))
    starts = [1, *(b + 1 for b in boundaries)]
    return list(zip(starts, [*boundaries, None], strict=True))


def type_name(prompt: Range, output: Range) -> str:
    """Name of a bin.

    Examples
    --------
    >>> type_name((1, 512), (129, None))
    'p1-512/o129+'
    """
    if prompt == WHOLE and output == WHOLE:
        return "all"
    shown = (f"{lo}+" if hi is None else f"{lo}-{hi}" for lo, hi in (prompt, output))
    return "p{}/o{}".format(*shown)


def bin_path(path: ArrivalPath, types: int, name: str) -> Workload:
    """The workload of `path`; see `ArrivalPath.to_workload`."""
    types = check_count("types", types, minimum=1)
    if len(path) < 2 or path.duration <= 0:
        raise InputError(
            f"path {path.name!r}",
            f"{len(path)} requests in {path.duration:g} s",
            "have at least two requests at different times",
            "Rates need a duration; build the Workload from RequestTypes with the rates you want.",
        )
    a, b = grid(types)
    prompt_ranges = quantile_ranges(path.prompt_tokens, a)
    if prompt_ranges is None:
        raise _too_few("prompt", a, np.unique(path.prompt_tokens), "the path")
    members = []
    for prompt_range in prompt_ranges:
        chosen = _inside(path.prompt_tokens, prompt_range)
        prompts, outputs = path.prompt_tokens[chosen], path.output_tokens[chosen]
        cached = (
            np.zeros_like(prompts) if path.cached_prompt_tokens is None else path.cached_prompt_tokens[chosen]
        )
        output_ranges = quantile_ranges(outputs, b)
        if output_ranges is None:
            raise _too_few(
                "output", b, np.unique(outputs), f"prompts {type_name(prompt_range, WHOLE).split('/')[0]}"
            )
        for output_range in output_ranges:
            kept = _inside(outputs, output_range)
            members.append(
                RequestType(
                    type_name(prompt_range, output_range),
                    int(kept.sum()) / path.duration,
                    lengths=joint(prompts[kept], outputs[kept]),
                    prompt_range=prompt_range,
                    output_range=output_range,
                    cached_prefix_fraction=int(cached[kept].sum()) / int(prompts[kept].sum()),
                )
            )
    return Workload(members, name, f"{types} bins of (prompt, output) of {len(path):,} requests, {path.name}")


def _inside(values: IntArray, bounds: Range) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    lo, hi = bounds
    return (values >= lo) & (values <= (np.inf if hi is None else hi))


def _too_few(what: str, groups: int, distinct: IntArray, where: str) -> InputError:
    return InputError(
        "types",
        f"{groups} ranges of {what} lengths where {where} has {len(distinct)} distinct",
        "not ask for more ranges than there are distinct lengths",
        "Ask for fewer types.",
    )


def merge_sizes(workload: Workload) -> tuple[int, ...]:
    """Numbers of types `merge` can give: a·b' and a', b' dividing b and a' dividing a, for an a × b grid."""
    rows = _rows(workload)
    if rows is None:
        return tuple(sorted({1, len(workload)}))
    a, b = len(rows), len(rows[0])
    return tuple(
        sorted({d for d in range(1, a + 1) if a % d == 0} | {a * d for d in range(1, b + 1) if b % d == 0})
    )


def merge(workload: Workload, types: int) -> Workload:
    """Join neighbouring bins; see `Workload.merged`."""
    sizes = merge_sizes(workload)
    if types not in sizes:
        raise InputError(
            "types", types, "be one of " + ", ".join(map(str, sizes)), "Other numbers do not join whole bins."
        )
    if types == len(workload):
        return workload
    rows = _rows(workload)
    if types == 1 or rows is None:
        parts = [list(workload.types)]
    elif types >= len(rows):
        width = len(workload) // types
        parts = [row[i : i + width] for row in rows for i in range(0, len(row), width)]
    else:
        height = len(rows) // types
        parts = [list(chain(*rows[i : i + height])) for i in range(0, len(rows), height)]
    return workload.with_types([_joined(part, whole=types == 1) for part in parts])


def _rows(workload: Workload) -> list[list[RequestType]] | None:
    """The types as a grid, a row per prompt range, all rows of one length, both ascending; else None."""
    by_prompt: dict[Range, list[RequestType]] = {}
    for member in workload.types:
        if member.prompt_range is None:
            return None
        by_prompt.setdefault(member.prompt_range, []).append(member)
    prompt_ranges = sorted(by_prompt, key=lambda r: r[0])
    rows = [
        sorted(by_prompt[r], key=lambda t: t.output_range[0] if t.output_range else 0) for r in prompt_ranges
    ]
    if len({len(row) for row in rows}) > 1 or not _partition(prompt_ranges):
        return None
    if not all(_partition([t.output_range for t in row if t.output_range]) for row in rows):
        return None
    return rows


def _partition(ranges: Sequence[Range]) -> bool:
    """Whether the ranges, in this order, partition [1, ∞)."""
    follows = all(before[1] is not None and after[0] == before[1] + 1 for before, after in pairwise(ranges))
    return ranges[0][0] == 1 and ranges[-1][1] is None and follows


def _joined(part: list[RequestType], *, whole: bool) -> RequestType:
    """One type in place of `part`: rates added, laws mixed in proportion to the rates, arrivals superposed."""
    if len(part) == 1:
        return part[0]
    if len({member.priority for member in part}) > 1:
        raise InputError("types", "types of different priority", "join types of one priority only")
    if len({member.cached_prefix_fraction for member in part}) > 1:
        raise InputError(
            "types",
            "types of different cached_prefix_fraction",
            "join types of one fraction only",
            "Give them one with workload.with_cached_prefixes.",
        )
    for argument in ("patience", "abort_after"):
        if len({getattr(member, argument) for member in part}) > 1:
            raise InputError("types", f"types of different {argument}", "join types of one law only")
    rate = math.fsum(member.arrival_rate for member in part)
    shares = [member.arrival_rate for member in part] if rate > 0 else [1.0] * len(part)
    if whole:
        prompt_range, output_range = WHOLE, WHOLE
    else:
        prompt_range, output_range = (
            (ranges[0][0], ranges[-1][1])
            for ranges in (
                sorted((r for r in given if r), key=lambda r: r[0])
                for given in ([m.prompt_range for m in part], [m.output_range for m in part])
            )
        )
    return RequestType(
        type_name(prompt_range, output_range),
        rate,
        lengths=_mixture([m.law for m in part], shares),
        prompt_range=prompt_range,
        output_range=output_range,
        priority=part[0].priority,
        arrivals=superposition([m.arrivals for m in part], shares),
        patience=part[0].patience,
        abort_after=part[0].abort_after,
        cached_prefix_fraction=part[0].cached_prefix_fraction,
    )


def _mixture(laws: list[JointLaw], shares: list[float]) -> JointLaw:
    points = [law.atoms() for law in laws]
    weights = np.concatenate([share * weight for share, (_, _, weight) in zip(shares, points, strict=True)])
    prompts, outputs = (np.concatenate([point[axis] for point in points]) for axis in (0, 1))
    return joint(prompts, outputs, weights)
