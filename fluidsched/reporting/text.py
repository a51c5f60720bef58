"""How a plan and the catalog read in a terminal: the objects' own texts, put into one page."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from fluidsched.comparison import WIDTH

if TYPE_CHECKING:
    from fluidsched.planning import Plan
    from fluidsched.policy import PolicyTable
    from fluidsched.server.catalog import CatalogEntry

__all__ = ["catalog_text", "certificate_rows", "plan_text"]

_GUARANTEES = {
    "certain": "always",
    "probability": "up to the overflow probability",
    "approximation": "about up to it: a normal approximation",
    "expectation": "in the mean, in the long run",
}


def plan_text(plan: Plan) -> str:
    """The plan as one page of text, in pipeline order, answer and recommendation last."""
    lines = [_heading("Workload"), repr(plan.workload), _heading("Server"), repr(plan.server)]
    lines += [_heading("Fluid solution"), repr(plan.fluid)]
    lines.append(_heading("Policy tables"))
    lines += [repr(table) for table in plan.tables]
    lines += [f"{name}: no table. {reason}" for name, reason in plan.missing.items()]
    lines += _certificate(plan.recommended_table)
    lines += [_heading("Comparison"), repr(plan.comparison)]
    lines += [_heading("Answer"), *(fill(remark, WIDTH) for remark in plan.remarks)]
    if plan.admission is not None:
        lines += [_heading("Whom to turn away"), repr(plan.admission)]
    lines += [_heading("Recommendation"), repr(plan.recommendation)]
    return "\n".join(lines) + "\n"


def certificate_rows(table: PolicyTable) -> list[list[str]]:
    """The entries of a certificate: name, value, unit, in which sense it holds."""
    rows = []
    for name, entry in table.certificate.items():
        value = entry["value"]
        text = f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
        rows.append([name, text, entry["unit"], _GUARANTEES[entry["guarantee"]]])
    return rows


def _certificate(table: PolicyTable) -> list[str]:
    rows = certificate_rows(table)
    lines = [f"  {name:<21} {value:>10} {unit:<36} {holds}" for name, value, unit, holds in rows]
    return [f"Certificate of {table.name!r}", *lines] if lines else []


def _heading(title: str) -> str:
    return f"\n{title}\n{'─' * len(title)}"


def catalog_text(entries: Sequence[CatalogEntry]) -> str:
    """The catalog as a table for people."""
    header = f"{'GPU':<16} {'model':<14} tp  {'source':<26}  KV tokens  mean error  worst"
    rows = [
        f"{e.gpu:<16} {e.model:<14} {e.tensor_parallel:>2}  {e.source:<26} {e.kv_capacity_tokens:>10,}"
        f"  {e.mean_error['two-piece']:>10.1%}  {e.largest_error['two-piece']:>5.0%}"
        for e in entries
    ]
    return "\n".join(
        [
            header,
            *rows,
            f"{len(rows)} entries; KV tokens that fit, and relative errors of the iteration time's two-piece fit. "
            "Of several sources the first is used.",
        ]
    )
