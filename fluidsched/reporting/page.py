"""A plan as one HTML page that needs nothing else: no network, no scripts, pictures inside.

It follows the reader's question: what was asked, the answer, what to run and what that gains, the figures, then the
numbers behind them and what they rest on. Everything that comes from the user (names of types, workloads, servers,
files) is escaped; tables and pictures wider than a phone scroll inside their own frames; printing keeps figures and
rows together.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from fluidsched import __version__
from fluidsched._files import write_whole
from fluidsched.comparison import bounds_text
from fluidsched.errors import InputError
from fluidsched.overload import NOTE
from fluidsched.recommendation import ENGINE_NAMES, PLUGIN_COMMAND
from fluidsched.reporting.files import pictures
from fluidsched.reporting.installation import show_versions
from fluidsched.reporting.text import certificate_rows
from fluidsched.simulation.measures import in_words

if TYPE_CHECKING:
    from fluidsched.planning import Plan
    from fluidsched.recommendation import Recommendation

__all__ = ["page", "report"]

CAPTIONS = {
    "gains.png": "What the recommended policy gains over the engines as they come, against the load: above zero is "
    "better, bands are 95 % intervals of the paired difference, hollow markers are within noise.",
    "load_curve.png": "Throughput and mean TTFT against the offered rate, every table as compiled for the present "
    "load. Hollow markers: the policy had fallen behind, so the latency is a lower bound. Shaded: where the "
    "recommended policy keeps up no further.",
    "latency.png": "Distribution of TTFT and end-to-end latency at the present load, all replications pooled.",
    "kv_occupancy.png": "KV tokens held over time in the first replication, against the capacity and the fluid "
    "equilibrium.",
}
"""What each picture of a plan shows, in the order of the page."""

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; --tint: #f3f6f9;
  --good: #00614a; --bad: #a63c00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, li { overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0;
  padding: 0; list-style: none; }
.cards li { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.cards strong { display: block; font-size: 1.35rem; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
tr.now td { background: var(--tint); font-weight: 600; }
td.better { color: var(--good); font-weight: 600; }
td.worse { color: var(--bad); font-weight: 600; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.columns { overflow-x: auto; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1rem; }
  h1 { font-size: 1.35rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  figure img { width: 44rem; max-width: none; }
  th, td { padding: .28rem .4rem; }
  table { font-size: .82rem; }
  dl { grid-template-columns: 1fr; }
  dt { margin-top: .4rem; }
}
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3 { break-after: avoid; }
  figure, tr, .scroll, .cards li { break-inside: avoid; }
  .scroll, pre.columns { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .35rem; }
  pre { font-size: 7pt; }
}
"""


def report(plan: Plan, path: str | os.PathLike[str] | None = None) -> str:
    """Return a plan as one self-contained HTML page, and write it to `path` (whole or not at all) if one is given.

    `Plan.write` puts the same page into the plan's directory, as ``report.html``.

    Parameters
    ----------
    plan : Plan
        What `fluidsched.plan` returned.
    path : path-like, optional

    Returns
    -------
    str
        The page: UTF-8 text, pictures inside as base64 PNG, nothing fetched from anywhere.

    Raises
    ------
    InputError
        If `plan` is something else, or the file cannot be written.

    Examples
    --------
    >>> import fluidsched as fs
    >>> text = fs.report(fs.plan(horizon=60.0, replications=2, curve=False))
    >>> text.startswith("<!DOCTYPE html>"), "<script" in text
    (True, False)
    """
    from fluidsched.planning import Plan as Planned

    if not isinstance(plan, Planned):
        raise InputError("plan", type(plan).__name__, "be what fluidsched.plan returned")
    text = page(plan, dict(pictures(plan)))
    if path is not None:
        write_whole(path, text)
    return text


def page(plan: Plan, images: Mapping[str, bytes]) -> str:
    """The page, from a plan and its pictures (file name → PNG)."""
    title = f"{plan.workload.name} on {plan.server.name}"
    body = [
        *_question(plan, title),
        *_answer(plan),
        *_recommendation(plan),
        *_admission(plan),
        *_figures(images),
        *_numbers(plan),
        *_basis(plan),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>fluidsched plan: {escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _question(plan: Plan, title: str) -> list[str]:
    count = len(plan.workload)
    rate = f"{plan.workload.total_arrival_rate:.4g} req/s"
    kinds = f"{count} request type{'s' if count > 1 else ''}"
    return [
        "<header>",
        f"<h1>{escape(title)}</h1>",
        f"<p>What load can this server carry, whom should it admit and when, and how good is that, at {rate} of "
        f"{kinds}?</p>",
        "</header>",
    ]


def _answer(plan: Plan) -> list[str]:
    reach, fluid = plan.recommendation.reach, plan.fluid
    needed = reach.in_servers() if reach.servers > 1 else reach.beyond()
    cards = (
        ("load, share of what fits", f"{float(fluid.load.max()):.2f}"),
        ("the server carries at most", f"{fluid.critical_rate:.2f} req/s"),
        ("recommended policy", plan.recommended),
        ("needed now" if reach.servers > 1 else "one more server needed", needed),
    )
    return [
        "<section>",
        "<h2>Answer</h2>",
        '<ul class="cards">',
        *(f"<li>{escape(what)} <strong>{escape(value)}</strong></li>" for what, value in cards),
        "</ul>",
        *(f"<p>{escape(remark)}</p>" for remark in plan.remarks),
        "</section>",
    ]


def _recommendation(plan: Plan) -> list[str]:
    found = plan.recommendation
    parts = ["<section>", "<h2>Recommendation</h2>", f"<p>{escape(found.reason)}</p>"]
    if found.stock_sentence():
        parts.append(f"<p>{escape(found.stock_sentence())}</p>")
    for engine, (command, names, lost) in found.engine_commands().items():
        parts.append(f"<h3>On stock {engine}</h3>")
        parts.append(f'<pre class="command">{escape(command)}</pre>')
        parts.append(f'<p class="soft">{escape(names)}.</p>')
        parts += _list(f"But not: {sentence}" for sentence in lost)
    if found.lost:
        parts.append("<h3>Exactly, with the library\u2019s scheduler inside vLLM</h3>")
        parts.append(f'<pre class="command">{escape(PLUGIN_COMMAND)}</pre>')
    parts.append("<h3>When one more server is needed</h3>")
    parts += _list(found.reach.lines(found.policy))
    for engine in dict.fromkeys(gain.engine for gain in found.gains):
        parts.append(f"<h3>Gain over {ENGINE_NAMES[engine]} as it comes, in % of its value</h3>")
        parts.append(_gain_table(found, engine))
    if found.gains:
        parts.append(f'<p class="soft">{escape(found.notes())}.</p>')
    return [*parts, "</section>"]


def _admission(plan: Plan) -> list[str]:
    found = plan.admission
    if found is None:
        return []
    return [
        "<section>",
        "<h2>Whom to turn away</h2>",
        _table(found.type_rows()),
        _table(found.policy_rows(), text=(0, 5)),
        f'<p class="soft">{escape(NOTE)}</p>',
        "</section>",
    ]


def _gain_table(found: Recommendation, engine: str) -> str:
    """The gains over an engine, beyond noise in colour; the sign and the star say the same without it."""
    header, *rows = found.gain_rows(engine)
    lines = [_row("th", header)]
    for cells in rows:
        marked = []
        for place, cell in enumerate(cells):
            beyond = place > 1 and cell.endswith("*")
            kind = ("worse" if "-" in cell else "better") if beyond else ""
            marked.append(f'<td class="{kind}">{escape(cell)}</td>' if kind else f"<td>{escape(cell)}</td>")
        now = ' class="now"' if cells[0].endswith("now") else ""
        lines.append(f"<tr{now}>{''.join(marked)}</tr>")
    return _framed(lines)


def _figures(images: Mapping[str, bytes]) -> list[str]:
    parts = ["<section>", "<h2>Figures</h2>"]
    for name, caption in CAPTIONS.items():
        if name in images:
            data = base64.b64encode(images[name]).decode("ascii")
            image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            parts.append(
                f'<figure><div class="scroll">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
            )
    return [*parts, "</section>"]


def _numbers(plan: Plan) -> list[str]:
    fluid, comparison = plan.fluid, plan.comparison
    rates, latencies = comparison.tables()
    parts = ["<section>", "<h2>Policies compared</h2>", f'<p class="soft">{escape(comparison.title)}</p>']
    parts += [_table(rates, text=(0, 4)), _table(latencies)]
    parts.append(f'<p class="soft">{escape(comparison.notes())}.</p>')
    if comparison.bounds:
        parts.append("<h3>Against every bound</h3>")
        parts.append(f'<pre class="columns">{escape(bounds_text(comparison.bounds))}</pre>')
    parts += ["</section>", "<section>", "<h2>Fluid solution</h2>"]
    loads = [[name, f"{value:.4g}"] for name, value in zip(fluid.resources, fluid.load, strict=True)]
    parts.append(_table([["resource", "load"], *loads]))
    types = [["type", "offered [req/s]", "admitted [req/s]", "reward", "bid price"]]
    for j, name in enumerate(plan.workload.type_names):
        values = (fluid.workload.arrival_rate[j], fluid.admitted_rate[j], fluid.reward[j], fluid.bid_price[j])
        types.append([name, *(f"{value:.4g}" for value in values)])
    parts.append(_table(types))
    parts += ["</section>", "<section>", "<h2>Policy tables</h2>"]
    parts.append(f'<pre class="columns">{escape(chr(10).join(repr(table) for table in plan.tables))}</pre>')
    parts += _list(f"{name}: no table. {reason}" for name, reason in plan.missing.items())
    rows = certificate_rows(plan.recommended_table)
    if rows:
        header = ["certified", "value", "unit", "holds"]
        parts.append(_table([header, *rows], text=(0, 2, 3), caption=f"Certificate of {plan.recommended}"))
    return [*parts, "</section>"]


def _basis(plan: Plan) -> list[str]:
    asked = plan.settings
    how = "The recorded requests, replayed once, whole." if asked["replay"] else ""
    if asked["horizon_s"] is not None:
        kind = "paths made of pieces of the recorded one" if asked["replay"] else "independent arrival paths"
        where = " Gains and other loads: " if asked["replay"] else ""
        how += (
            f"{where}{asked['replications']} {kind}, common to all policies and loads; "
            f"{asked['horizon_s']:,g} s each, the first {asked['warmup_s']:,g} s left out of the measures; "
            f"seed {asked['seed']}."
        )
    targets = ", ".join(f"{in_words(name)} ≤ {limit:g} s" for name, limit in asked["targets_s"].items())
    rows = {
        "Simulation": how,
        "Objective": f"{asked['objective']}, as the fluid program maximises them",
        "Targets": targets or "none stated",
        "Overflow probability": f"{asked['overflow_probability']:g} per iteration, of the compiled tables",
        "Iteration times": plan.server.source or "as given with the server",
        "fluidsched": __version__,
    }
    assumptions = (
        "The fluid optimum bounds the long-run throughput of every policy under the conditions stated in "
        "fluidsched/fluid/__init__.py: no KV shared between requests, and no policy that completes requests of one "
        "type selectively by their length. It says nothing about waiting.",
        "An iteration lasts the longest of the server's affine pieces; absolute times are no better than the fit of "
        "these, named above.",
        "Simulated policies follow the rules of their engines as tables: no network, no tokenizer, no failures, no "
        "prefix cache, and one server.",
        "Differences between policies are paired over the same arrivals; every interval is 95 %, each by itself.",
    )
    return [
        "<section>",
        "<h2>What this rests on</h2>",
        "<dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()),
        "</dl>",
        *_list(assumptions),
        "<h3>Workload and server</h3>",
        f'<pre class="columns">{escape(repr(plan.workload))}</pre>',
        f'<pre class="columns">{escape(repr(plan.server))}</pre>',
        "<h3>Versions</h3>",
        f'<pre class="columns">{escape(show_versions())}</pre>',
        "</section>",
    ]


def _list(sentences: Iterable[str]) -> list[str]:
    items = [f"<li>{escape(sentence)}</li>" for sentence in sentences]
    return ["<ul>", *items, "</ul>"] if items else []


def _row(tag: str, cells: Sequence[str], text: Sequence[int] = ()) -> str:
    inside = "".join(
        f'<{tag} class="text">{escape(cell)}</{tag}>' if place in text else f"<{tag}>{escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    )
    return f"<tr>{inside}</tr>"


def _table(rows: Sequence[Sequence[str]], *, text: Sequence[int] = (), caption: str = "") -> str:
    """Rows of cells, the header first; columns named in `text` are set to the left."""
    return _framed([_row("th", rows[0], text), *(_row("td", row, text) for row in rows[1:])], caption)


def _framed(lines: Sequence[str], caption: str = "") -> str:
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(lines[1:])
    return f'<div class="scroll"><table>{head}<thead>{lines[0]}</thead><tbody>{body}</tbody></table></div>'
