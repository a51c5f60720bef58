r"""Rules of the engines people run, as policy tables: what every compiled table is compared with.

None but `class_budget` looks at types: one row ``*`` matches every request.
C is the server's KV capacity in tokens, B its largest batch in requests.
"""

from __future__ import annotations

from collections.abc import Mapping

import fluidsched
from fluidsched._checks import check_choice, check_count
from fluidsched.errors import InputError
from fluidsched.policy.table import Lookahead, Match, PolicyTable, TableType

__all__ = [
    "a_max",
    "a_min",
    "class_budget",
    "faster_transformer",
    "mc_sf",
    "orca",
    "sarathi",
    "vllm",
    "vllm_v0",
]


def _provenance() -> dict[str, object]:
    return {"inputs": {}, "version": fluidsched.__version__, "seed": None}


def vllm(
    name: str = "vllm",
    *,
    token_budget: int | None = 2048,
    max_in_service: int | None = None,
    watermark: float = 0.0,
    whole_prompt_admission: bool = True,
    chunk_tokens: int | None = None,
    prefill_interval: int | None = None,
) -> PolicyTable:
    """Return the rule of vLLM's v1 scheduler with its stock settings.

    Each iteration has one budget of tokens. Running requests come first, in the order of their admission:
    each takes its remaining prompt, cut to what the budget leaves, or one decode token. When KV runs short
    the most recently admitted request is preempted: its KV is dropped, its tokens are kept, and it goes
    back to the front of the queue to be recomputed. Only if nothing was preempted in this iteration,
    waiting requests enter first come, first served while budget, slots and KV allow; one enters only if
    its prompt and the tokens it has already generated fit into what is free now, although only its first
    chunk is allocated.

    Parameters
    ----------
    name : str
        Name of the table.
    token_budget : int or None
        Tokens per iteration (``max_num_batched_tokens``). None: the server's limit.
    max_in_service : int, optional
        Most residents (``max_num_active_seqs``). None: the server's largest batch.
    watermark : float
        Fraction of the KV blocks that admission leaves free unless nothing runs.
    whole_prompt_admission : bool
        False: only the first chunk must fit (``scheduler_reserve_full_isl`` off).
    chunk_tokens : int, optional
        Most prompt tokens of one request per iteration (``long_prefill_token_threshold``).
    prefill_interval : int, optional
        Admit prefills every so many iterations (``prefill_schedule_interval``). It also holds the chunks
        of running prefills, counts from the last iteration with prefill, and switches itself off while the
        queue was not emptied at the last release.

    Returns
    -------
    PolicyTable
        Kind "vllm".

    References
    ----------
    vLLM 0.33, ``vllm/v1/core/sched/scheduler.py``; Kwon et al., *Efficient Memory Management for Large
    Language Model Serving with PagedAttention*, SOSP 2023.

    Examples
    --------
    >>> vllm()
    PolicyTable 'vllm': kind vllm, 1 type, token budget 2,048
    """
    return PolicyTable(
        name,
        "vllm",
        (TableType("*"),),
        token_budget=token_budget,
        max_in_service=max_in_service,
        watermark=watermark,
        whole_prompt_admission=whole_prompt_admission,
        chunk_tokens=chunk_tokens,
        prefill_interval=prefill_interval,
        provenance=_provenance(),
    )


def vllm_v0(
    name: str = "vllm_v0",
    *,
    token_budget: int | None = None,
    max_in_service: int | None = None,
    watermark: float = 0.01,
) -> PolicyTable:
    """Return the rule of vLLM's first scheduler (v0, without chunked prefill): prompts before decodes.

    If anybody waits and a slot and KV allow, the iteration is a batch of prompts alone, whole ones, first
    come, first served; all who are in service pause with their KV kept. Otherwise every request in service
    decodes. When KV runs short the most recently admitted request is preempted, keeps its tokens, and goes
    back to the front of the queue to be recomputed as one prompt. So a stream of newcomers stops all
    decoding until slots or memory are used up.

    Parameters
    ----------
    name : str
        Name of the table.
    token_budget : int, optional
        Prompt tokens per iteration (``max_num_batched_tokens``); must hold the longest prompt with all its
        output, which a recompute may run as one. None: the server's limit.
    max_in_service : int, optional
        Most residents (``max_num_seqs``, 256 in the engine). None: the server's largest batch.
    watermark : float
        Fraction of the KV blocks that admission leaves free unless nothing runs.

    Returns
    -------
    PolicyTable
        Kind "vllm_v0".

    References
    ----------
    vLLM up to 0.8, ``vllm/core/scheduler.py``, ``_schedule_default``; Kwon et al., *Efficient Memory
    Management for Large Language Model Serving with PagedAttention*, SOSP 2023.

    Examples
    --------
    >>> vllm_v0(max_in_service=256)
    PolicyTable 'vllm_v0': kind vllm_v0, 1 type, at most 256 in service
    """
    return PolicyTable(
        name,
        "vllm_v0",
        (TableType("*"),),
        token_budget=token_budget,
        max_in_service=max_in_service,
        watermark=watermark,
        provenance=_provenance(),
    )


def sarathi(token_budget: int = 512, name: str = "sarathi") -> PolicyTable:
    """Return the stall-free rule of Sarathi-Serve: decodes never wait for prompts.

    Each iteration takes all decodes, one token each, which count against the budget; then partly prefilled
    requests in the order of their admission, each a chunk of what the budget leaves; then new ones, first
    come, first served, chunk by chunk up to the budget, while KV and slots allow. Partly prefilled
    requests count in the batch cap. On KV shortage the most recently admitted request is preempted and
    recomputed.

    Parameters
    ----------
    token_budget : int
        Tokens per iteration, decodes included (the chunk size of the paper).
    name : str
        Name of the table.

    Returns
    -------
    PolicyTable
        Kind "sarathi".

    References
    ----------
    Agrawal et al., *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*, OSDI 2024.

    Examples
    --------
    >>> sarathi().token_budget
    512
    """
    return PolicyTable(
        name, "sarathi", (TableType("*"),), token_budget=token_budget, provenance=_provenance()
    )


def orca(max_output_tokens: int, name: str = "orca") -> PolicyTable:
    r"""Return the rule of Orca: scheduling per iteration, first come, first served, memory reserved ahead.

    A request enters when a slot of the batch is free and KV for its prompt and the longest output it may
    produce can be set aside: with R = `max_output_tokens`,

        Σ over those in service and the newcomer of (prompt + R − 1) ≤ C.

    (A request of R output tokens holds at most prompt + R − 1 tokens of KV, the last one's KV being never
    written.) The scan of the queue stops at the first request that does not fit. Prompts run whole in one
    iteration. Nothing is ever preempted, provided no request produces more than R tokens; what is reserved
    and never used is the price.

    Parameters
    ----------
    max_output_tokens : int
        R, tokens: the longest output a request may ask for, e.g. ``path.output_tokens.max()``. No engine knows a
        request's output length, so the limit is part of the rule.
    name : str
        Name of the table.

    Returns
    -------
    PolicyTable
        Kind "orca", ``lookahead = (mode="reserve", headroom_tokens=R)``.

    References
    ----------
    Yu et al., *Orca: A Distributed Serving System for Transformer-Based Generative Models*, OSDI 2022,
    algorithm 1 (which reserves ``max_tokens`` slots per request).

    Examples
    --------
    >>> orca(max_output_tokens=1000).lookahead.headroom_tokens
    1000.0
    """
    limit = check_count("max_output_tokens", max_output_tokens, minimum=1)
    return PolicyTable(
        name, "orca", (TableType("*"),), lookahead=Lookahead("reserve", limit), provenance=_provenance()
    )


def faster_transformer(max_output_tokens: int, name: str = "faster_transformer") -> PolicyTable:
    r"""Return the rule of FasterTransformer: static batches that run to completion.

    While anybody is in service nobody enters. When the last one has finished, as many of those waiting as
    slots, token budget and memory allow enter together, first come, first served, with memory set aside as
    by `orca`, for prompt + R − 1 tokens each. A request leaves when it has finished; the place it leaves
    stays empty and costs nothing (no padding), so the rule is at its best here.

    Parameters
    ----------
    max_output_tokens : int
        R, tokens: the longest output a request may ask for.
    name : str
        Name of the table.

    Returns
    -------
    PolicyTable
        Kind "faster_transformer", ``lookahead = (mode="reserve", headroom_tokens=R)``.

    References
    ----------
    NVIDIA FasterTransformer, as the baseline of Yu et al., *Orca: A Distributed Serving System for
    Transformer-Based Generative Models*, OSDI 2022.

    Examples
    --------
    >>> faster_transformer(max_output_tokens=1000)
    PolicyTable 'faster_transformer': kind faster_transformer, 1 type, look-ahead reserve 1,000 tokens
    """
    limit = check_count("max_output_tokens", max_output_tokens, minimum=1)
    return PolicyTable(
        name,
        "faster_transformer",
        (TableType("*"),),
        lookahead=Lookahead("reserve", limit),
        provenance=_provenance(),
    )


def _shortest_that_fits(name: str, predictor: str | None, preemption: str) -> PolicyTable:
    """Shortest believed output first, while the residents' memory fits at every later iteration."""
    check_choice("preemption", preemption, ("recompute", "restart"))
    return PolicyTable(
        name,
        "vllm",
        (TableType("*"),),
        lookahead=Lookahead("known"),
        order="shortest_first",
        predictor=predictor,
        preemption=preemption,
        provenance=_provenance(),
    )


def mc_sf(name: str = "mc_sf", *, predicted: bool = False) -> PolicyTable:
    """Return the rule MC-SF: shortest output first, checked at every later completion.

    Those in service stay. Waiting requests enter in the order of their output lengths, shortest first, while the
    memory of all in service, each growing by a token per iteration until it ends, stays within C at every later
    iteration (between two completions it only grows, so that completions are what is checked). The scan stops at
    the first request that does not fit. With true lengths nothing is ever preempted.

    Parameters
    ----------
    name : str
        Name of the table.
    predicted : bool
        Believe the path's `predicted_output_tokens` instead of true lengths. A request that outlives its prediction
        is taken to leave after its next token; memory may then overflow, and the most recently admitted request is
        preempted and keeps its tokens.

    Returns
    -------
    PolicyTable
        Kind "vllm", order "shortest_first", ``lookahead = (mode="known", headroom_tokens=0)``.

    References
    ----------
    Jaillet, Jiang, Mellou, Molinaro, Podimata, Zhou, *Online Scheduling for LLM Inference with KV Cache
    Constraints*, arXiv 2502.07115, whose iterations all take the same time and which prefills a prompt in one.

    Examples
    --------
    >>> mc_sf().order, mc_sf().lookahead.mode
    ('shortest_first', 'known')
    """
    return _shortest_that_fits(name, None if predicted else "exact", "recompute")


def a_max(name: str = "a_max") -> PolicyTable:
    """Return the rule A_max: `mc_sf` as if every output had the upper end of its predicted interval.

    Where no output is longer than its upper end nothing is preempted (as long as the token budget lets every decode
    go on); memory set aside for tokens that never come is the price. A longer one is taken to leave after its next
    token, as by `mc_sf`.

    Parameters
    ----------
    name : str
        Name of the table.

    Returns
    -------
    PolicyTable
        As `mc_sf`, believing `predicted_output_tokens`.

    References
    ----------
    Chen, Ye, Zhou, *Adaptively Robust LLM Inference Optimization under Prediction Uncertainty*, arXiv 2508.14544.

    Examples
    --------
    >>> a_max().predictor is None
    True
    """
    return _shortest_that_fits(name, None, "recompute")


def a_min(name: str = "a_min", *, preemption: str = "recompute") -> PolicyTable:
    """Return the rule A_min: `mc_sf` as if every output had the lower end of its interval, raised as tokens come.

    A request that outlives the lower end is known to be longer than what it has produced, and is taken to leave after
    its next token. When memory runs short requests give way.

    The choices made here: the most recently admitted gives way first, as under every rule of this simulator (the
    paper's own order is not reproduced), and the queue stays in the order of the lower
    ends given at arrival; what gave way comes first.

    Parameters
    ----------
    name : str
        Name of the table.
    preemption : {"recompute", "restart"}
        Whether a request that gave way keeps its tokens (its lower end then stays raised) or starts anew.

    Returns
    -------
    PolicyTable
        As `mc_sf`, with predictor "lower": it believes `predicted_output_minimum`.

    References
    ----------
    Chen, Ye, Zhou, *Adaptively Robust LLM Inference Optimization under Prediction Uncertainty*, arXiv 2508.14544.

    Examples
    --------
    >>> a_min().predictor
    'lower'
    """
    return _shortest_that_fits(name, "lower", preemption)


def class_budget(budgets: Mapping[str, int], name: str = "class_budget") -> PolicyTable:
    """Return the rule that admits at most b_j newcomers of class j per iteration.

    With iterations of equal length ΔT it keeps up if b_j > λ_j ΔT, and memory suffices in the mean if
    Σ_j b_j W_j ≤ C, W_j the memory one request of class j takes over its life, summed over iterations.

    Parameters
    ----------
    budgets : mapping of str to int
        b_j, newcomers per iteration, by request type. Requests of other types are refused by the simulator.
    name : str
        Name of the table.

    Returns
    -------
    PolicyTable
        Kind "gated" with thresholds b_j, gates 0 and periods 1.

    Raises
    ------
    InputError
        No budget is given, or one is no whole number.

    References
    ----------
    Dong, Cao, arXiv 2604.11001.

    Examples
    --------
    >>> class_budget({"chat": 2, "code": 1}).thresholds
    array([2, 1])
    """
    if not isinstance(budgets, Mapping) or not budgets:
        raise InputError("budgets", budgets, "name at least one request type with its budget")
    rows = tuple(
        TableType(row, Match(label=row), threshold=check_count(f"budgets[{row!r}]", budget), gate=0, period=1)
        for row, budget in budgets.items()
    )
    return PolicyTable(name, "gated", rows, provenance=_provenance())
