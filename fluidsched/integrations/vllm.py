r"""A policy table inside vLLM's scheduler.

    vllm serve MODEL --scheduler-cls fluidsched.integrations.vllm.FluidScheduler \
        --additional-config '{"fluidsched": {"policy": "policy.json"}}'

`FluidScheduler` is vLLM's own asynchronous scheduler with two things changed in each iteration: its queue shows
only the waiting requests the table admits, and running requests the table pauses are passed over, their KV
kept. Budgets, chunked prefill, KV allocation, preemption and everything else stay vLLM's. The decisions are
those of `fluidsched.integrations.holding`, batch for batch those of the simulator.

Keys of ``fluidsched`` in ``--additional-config``:

==================  ========================================================================================
``policy``          path of the policy table, JSON (required)
``max_hold_s``      longest hold, s, of rows that state none; default 10, null: none (a quiet server may then
                    never serve its last requests)
``output_tokens``   "none" (default) or "max_tokens": whether a request's ``max_tokens`` stands for its output
                    length where the request does not say
``log_interval_s``  seconds between lines of counters in the log; default 60, null: none
``any_version``     true runs a vLLM outside the supported range
==================  ========================================================================================

A table that looks ahead (`fluidsched.policy.forecast`) is asked of one waiting request at a time, when those in
service have their tokens of the iteration; headroom is kept free as a watermark is. A request that states no output
length (below) is believed to use up its ``max_tokens``, and never believed to be longer; prefix-cache hits are not
looked up, so a prompt counts as if all of it were still to be computed.

A request's row is the first whose match holds: by prompt length, by label if the request names one
(``vllm_xargs: {"fluidsched_type": "chat"}``, or the row's index), by output length if it states a prediction
(``{"fluidsched_output_tokens": 200}``). A request no row matches is admitted as stock vLLM would, and counted.

The counters are `FluidScheduler.counters`, logged, and, where prometheus_client is installed, exported as
``fluidsched_*``; vLLM's own endpoint shows them when PROMETHEUS_MULTIPROC_DIR is set, because the scheduler runs
in a process of its own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InputError
from fluidsched.integrations.holding import HeldQueue, Resident, match_row, rule_of
from fluidsched.policy.forecast import Forecast, Served
from fluidsched.policy.table import PolicyTable

try:
    import vllm
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.request_queue import RequestQueue
except ImportError as error:
    raise ImportError(
        "fluidsched.integrations.vllm runs inside vLLM, which cannot be imported here; install it beside "
        f"fluidsched in the environment that serves ({error})"
    ) from error

__all__ = ["SUPPORTED", "FluidScheduler", "read_settings"]

SUPPORTED = ((0, 33), (0, 34))
"""Versions of vLLM this module was run with: from the first up to, not including, the second."""

DEFAULT_MAX_HOLD_S = 10.0
"""Longest hold, s, of rows that state none."""

PAUSED = 1 << 60
"""An iteration that is never reached: vLLM passes over a running request until the one it is marked with."""

_logger = logging.getLogger("vllm.fluidsched")


def read_settings(additional_config: Any) -> dict[str, Any]:
    """Return the settings of ``additional_config["fluidsched"]``, defaults filled in.

    Raises
    ------
    InputError
        Naming the key that is missing, unknown or of another kind.
    """
    given = additional_config.get("fluidsched") if isinstance(additional_config, Mapping) else None
    where = 'additional_config["fluidsched"]'
    if not isinstance(given, Mapping):
        raise InputError(where, given, 'be an object such as {"policy": "policy.json"}')
    settings: dict[str, Any] = {
        "policy": None,
        "max_hold_s": DEFAULT_MAX_HOLD_S,
        "output_tokens": "none",
        "log_interval_s": 60.0,
        "any_version": False,
    }
    for name in given:
        if name not in settings:
            raise InputError(f"{where}.{name}", "an unknown key", f"be one of {', '.join(settings)}")
    settings.update(given)
    if not isinstance(settings["policy"], str):
        raise InputError(f"{where}.policy", settings["policy"], "be the path of a policy table, JSON")
    for name in ("max_hold_s", "log_interval_s"):
        if settings[name] is not None:
            settings[name] = check_real(f"{where}.{name}", settings[name], above=0.0)
    check_choice(f"{where}.output_tokens", settings["output_tokens"], ("none", "max_tokens"))
    if not isinstance(settings["any_version"], bool):
        raise InputError(f"{where}.any_version", settings["any_version"], "be true or false")
    return settings


class _Queue(RequestQueue):  # type: ignore[misc]
    """vLLM's queue interface over a `HeldQueue`: what is shut, the engine does not see."""

    def __init__(self, held: HeldQueue[Any], row_of: Callable[[Any], int], clock: Callable[[], float]):
        self.held = held
        self._row_of = row_of
        self._clock = clock

    def add_request(self, request: Any) -> None:
        self.held.join(request, self._row_of(request), self._clock())

    def pop_request(self) -> Any:
        return self.held.take()

    def peek_request(self) -> Any:
        request = self.held.front()
        if request is None:
            raise IndexError("peek into a queue that shows nobody")
        return request

    def prepend_request(self, request: Any) -> None:
        self.held.put_back(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.held.put_back(request)

    def remove_request(self, request: Any) -> None:
        self.held.discard(request)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.held.discard(request)

    def __bool__(self) -> bool:
        return self.held.front() is not None

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.held)


class FluidScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler, admitting and pausing as a policy table says.

    Attributes
    ----------
    table : PolicyTable
        What it follows.
    counters : dict
        Since the start: `iterations` that ran, `admitted` newcomers, `held_iterations` (iterations in which
        somebody waited and nobody was admitted), `paused` (residents passed over, summed over iterations),
        `unmatched` requests, and the present number `waiting`.

    Raises
    ------
    InputError
        At start: settings, table or server do not go together; the message says what to change.
    """

    max_num_active_reqs: int
    max_num_scheduled_tokens: int
    local_prefill_interval: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        _check_version(vllm.__version__, settings["any_version"])
        self.table = PolicyTable.from_json(settings["policy"])
        self._rule = rule_of(self.table, settings["max_hold_s"])
        self._output_from_limit = settings["output_tokens"] == "max_tokens"
        self._log_interval_s = settings["log_interval_s"] or math.inf
        _check_scheduler(self, self.table)
        _check_memory(self, self.table)
        self._forecast_limit = self._apply_limits()
        priorities = [math.inf if row.priority is None else row.priority for row in self.table.types]
        self._held: HeldQueue[Any] = HeldQueue(
            priorities,
            row_by_row=self.table.kind == "wait",
            length_of=None
            if self.table.order == "fcfs"
            else lambda request: self._believed[request.request_id],
        )
        self.waiting = _Queue(self._held, self._row_of, lambda: self.clock())
        self._rows: dict[str, int] = {}
        self._believed: dict[str, int] = {}
        self._forecast = Forecast(self.table.lookahead, self.block_size, self._forecast_limit)
        self._step, self._forecast_step, self._forecast_of, self._served_tokens = 0, 0, 0, 0
        self._judged, self._verdict = (0, "", 0), True
        self._scheduled: dict[str, int] = {}
        self._allocate = self.kv_cache_manager.allocate_slots
        self._watched = False
        self._names: list[str] = []
        self._fixed = np.empty((3, 0), dtype=np.int64)  # prompt, limit and believed length of those named
        if self.table.lookahead.mode != "none":
            self._held.may_admit = self._fits_ahead
        self.clock: Callable[[], float] = time.monotonic
        self._next_log_s = self.clock() + self._log_interval_s
        self.counters = dict.fromkeys(
            ("iterations", "admitted", "held_iterations", "paused", "unmatched", "waiting"), 0
        )
        self._export = _exporter(self.table.name)
        _logger.info("following policy %r: %s", self.table.name, repr(self.table).splitlines()[0])

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One iteration of vLLM, with the table's newcomers visible and its frozen residents passed over."""
        now = self.clock()
        running = self.running
        decision = self._rule.decide(now, self._held, self._residents)
        marks = [(running[i], running[i].next_decode_eligible_step) for i in decision.paused]
        for request, _ in marks:
            request.next_decode_eligible_step = PAUSED
        self._held.open(decision.allowances)
        self._step += 1
        if self._held.may_admit is not None:
            self._scheduled.clear()
            self._watch(self.num_spec_tokens > 0 or any(request.is_prefill_chunk for request in running))
        try:
            output = super().schedule(*args, **kwargs)
        finally:  # a mark that outlived its iteration would strand the request
            admitted = self._held.shut()
            for request, mark in marks:
                request.next_decode_eligible_step = mark
        anything = output.total_num_scheduled_tokens > 0
        self._rule.ran(admitted, anything, now)
        self._count(sum(admitted.values()), anything, len(marks), now)
        return output

    def _residents(self) -> list[Resident]:
        return [
            Resident(
                request.request_id,
                self._rows[request.request_id],
                request.arrival_time,
                request.num_output_tokens + request.num_output_placeholders,
                not _has_all_tokens(request),
            )
            for request in self.running
        ]

    # ------------------------------------------------------------------ looking ahead

    def _fits_ahead(self, request: Any) -> bool:
        """Rule 32, asked when those in service and earlier newcomers have their tokens."""
        running, scheduled = self.running, self._scheduled
        asked = self._step, request.request_id, len(running)
        if self._judged == asked:  # vLLM looks at the front more than once
            return self._verdict
        if self._forecast_step != self._step:
            self._forecast_step, self._served_tokens = self._step, self._start_forecast()
            self._watch(True)
            scheduled.clear()
        else:
            for newcomer in running[self._forecast_of :]:
                self._forecast.add(self._served(newcomer, scheduled[newcomer.request_id]))
        self._forecast_of = len(running)
        chunk = self.max_num_scheduled_tokens - self._served_tokens - sum(scheduled.values())
        if self.scheduler_config.long_prefill_token_threshold > 0:
            chunk = min(chunk, self.scheduler_config.long_prefill_token_threshold)
        fits = self._forecast.fits(self._served(request, min(request.num_tokens, chunk)))
        self._judged, self._verdict = asked, fits or not running
        return self._verdict

    def _start_forecast(self) -> int:
        """Forecast for those in service who are not yet at their end; return the tokens they get in this iteration."""
        running = self.running
        names = [request.request_id for request in running]
        if names != self._names:
            self._read_fixed(names)
        prompt, limit, believes = self._fixed
        produced = _integers(
            [request.num_output_tokens + request.num_output_placeholders for request in running]
        )
        if self._watched:
            tokens = _integers([self._scheduled.get(name, 0) for name in names])
            after = _integers([request.num_computed_tokens for request in running]) + tokens
        else:
            after, tokens = prompt + produced, np.ones_like(produced)
        served = np.array([prompt, produced, after, believes])
        ended = produced >= limit
        if ended.any():
            for i in np.flatnonzero(ended):
                ended[i] = _has_all_tokens(running[i])
            served, tokens = served[:, ~ended], tokens[~ended]
        self._forecast.start(served)
        return int(tokens.sum())

    def _read_fixed(self, names: list[str]) -> None:
        """Read what stays as it is of those who entered; vLLM puts them behind those who were there."""
        present = len(names)
        stay: list[int] = []
        for j, name in enumerate(self._names):
            if len(stay) < present and names[len(stay)] == name:
                stay.append(j)
        entered = [
            (request.num_prompt_tokens, request.max_tokens, self._believed[request.request_id])
            for request in self.running[len(stay) :]
        ]
        fixed = np.empty((3, present), dtype=np.int64)
        fixed[:, : len(stay)] = self._fixed.take(_integers(stay), axis=1)
        if entered:
            fixed[:, len(stay) :] = np.array(entered).T
        self._names, self._fixed = names, fixed

    def _watch(self, watched: bool) -> None:
        """Whether to note what vLLM gives whom in the iteration it plans.

        Newcomers are always watched. Of those in service it would cost as much as all else here, and it is needed only
        while a prompt is computed: who decodes gets one token, or vLLM admits nobody in this iteration.
        """
        self._watched = watched
        self.kv_cache_manager.allocate_slots = self._allocate_and_note if watched else self._allocate

    def _allocate_and_note(self, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        blocks = self._allocate(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            self._scheduled[request.request_id] = num_new_tokens
        return blocks

    def _served(self, request: Any, tokens: int) -> Served:
        """A request that gets so many tokens in this iteration."""
        return Served(
            request.num_prompt_tokens,
            request.num_output_tokens + request.num_output_placeholders,
            request.num_computed_tokens + tokens,
            self._believed[request.request_id],
        )

    # ------------------------------------------------------------------ requests and limits

    def add_request(self, request: Any) -> None:
        """Find the request's row and queue it."""
        self._classify(request)
        self._believed[request.request_id] = _believed_output(request)
        super().add_request(request)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._rows.pop(request.request_id, None)
        self._believed.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _row_of(self, request: Any) -> int:
        return self._rows[request.request_id]

    def _classify(self, request: Any) -> None:
        unknown = len(self.table.types)
        extra = _extra(request)
        stated = extra.get("fluidsched_type")
        output = extra.get("fluidsched_output_tokens")
        if output is None and self._output_from_limit:
            output = request.max_tokens
        if isinstance(stated, int) and 0 <= stated < unknown:
            row: int | None = stated
        elif stated in self.table.type_names:
            row = self.table.type_names.index(stated)
        else:
            output = output if isinstance(output, int) else None
            row = match_row(self.table, request.num_prompt_tokens, output, stated)
        if row is None:
            self.counters["unmatched"] += 1
            row = unknown
        self._rows[request.request_id] = row

    def _apply_limits(self) -> int:
        """The table's limits where they are tighter than the server's; return the blocks a forecast may reach."""
        table = self.table
        if table.max_in_service is not None:
            self.max_num_active_reqs = min(self.max_num_active_reqs, table.max_in_service)
        if table.token_budget is not None:
            self.max_num_scheduled_tokens = min(self.max_num_scheduled_tokens, table.token_budget)
        if table.chunk_tokens is not None:
            threshold = self.scheduler_config.long_prefill_token_threshold
            self.scheduler_config.long_prefill_token_threshold = (
                min(threshold, table.chunk_tokens) if threshold > 0 else table.chunk_tokens
            )
        if table.prefill_interval is not None:
            self.local_prefill_interval = max(self.local_prefill_interval, table.prefill_interval)
            self.last_prefill_step = -self.local_prefill_interval
        self.scheduler_reserve_full_isl = table.whole_prompt_admission
        blocks = self.kv_cache_config.num_blocks - 1  # vLLM keeps one block for itself
        keep = math.ceil(table.watermark * blocks)
        if table.kv_limit_tokens is not None:
            keep = max(keep, blocks - math.floor(table.kv_limit_tokens) // self.block_size)
        if table.lookahead.mode in ("known", "law"):
            keep += -(-math.ceil(table.lookahead.headroom_tokens) // self.block_size)
        manager = self.kv_cache_manager
        manager.watermark_blocks = max(manager.watermark_blocks, keep)
        return int(blocks - manager.watermark_blocks)

    def _count(self, admitted: int, anything: bool, paused: int, now: float) -> None:
        counters = self.counters
        waiting = len(self._held)
        counters["iterations"] += anything
        counters["admitted"] += admitted
        counters["held_iterations"] += waiting > 0 and admitted == 0
        counters["paused"] += paused
        counters["waiting"] = waiting
        if self._export is not None:
            self._export(counters)
        if now >= self._next_log_s:
            self._next_log_s = now + self._log_interval_s
            _logger.info("policy %r: %s", self.table.name, ", ".join(f"{k} {v}" for k, v in counters.items()))


def _integers(values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter(values, np.int64, len(values))  # np.array looks at every value for its kind first


def _extra(request: Any) -> Mapping[str, Any]:
    """What the client sent in ``vllm_xargs``."""
    return getattr(request.sampling_params, "extra_args", None) or {}


def _believed_output(request: Any) -> int:
    """The output length a request states, or all that it may produce."""
    stated = _extra(request).get("fluidsched_output_tokens")
    limit = int(request.max_tokens)
    return int(min(stated, limit)) if isinstance(stated, int) and stated > 0 else limit


def _has_all_tokens(request: Any) -> bool:
    """Whether the request's last token is in flight, as vLLM's own loop over running requests asks."""
    return bool(
        request.num_output_placeholders > 0
        and request.num_computed_tokens + 2 - request.num_output_placeholders
        >= request.num_prompt_tokens + request.max_tokens
    )


# ------------------------------------------------------------------ what must hold at start


def _check_version(version: str, any_version: bool) -> None:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if any_version or SUPPORTED[0] <= numbers < SUPPORTED[1]:
        return
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    raise InputError(
        "vLLM's version",
        version,
        f"be at least {low} and below {high}, the versions this scheduler was run with",
        'Its scheduler\'s inside changes between versions; set "any_version": true to try this one.',
    )


def _check_scheduler(scheduler: Any, table: PolicyTable) -> None:
    """Refuse set-ups in which the engine would not do what the table says."""
    config = scheduler.scheduler_config
    _require(
        config.policy == "fcfs", "--scheduling-policy", config.policy, "be fcfs: the table has the order"
    )
    stages = scheduler.parallel_config.pipeline_parallel_size
    _require(stages == 1, "--pipeline-parallel-size", stages, "be 1")
    _require(scheduler.connector is None, "--kv-transfer-config", "a connector", "not be given")
    if not table.freeze:
        return
    cohort = table.certified("largest_cohort")
    if cohort is not None:
        needed = int(cohort)
        budget = scheduler.max_num_scheduled_tokens
        _require(
            budget >= needed,
            "--max-num-batched-tokens",
            budget,
            f"be at least {needed:,}, the largest cohort of policy {table.name!r}, whose prompts run whole",
        )


def _check_memory(scheduler: Any, table: PolicyTable) -> None:
    capacity = (scheduler.kv_cache_config.num_blocks - 1) * scheduler.block_size
    made_for = table.certified("memory", "capacity")
    if made_for is None or math.isinf(made_for):
        return
    if capacity + scheduler.block_size <= made_for:
        raise InputError(
            "the engine's KV cache",
            f"{capacity:,} tokens",
            f"be at least the {made_for:,.0f} tokens that policy {table.name!r} was compiled for",
            f"Compile the policy with kv_capacity={capacity:,}, or give the engine more memory.",
        )
    if capacity > 1.1 * made_for:
        _logger.warning(
            "policy %r was compiled for %s tokens of KV, the engine has %s: it will leave memory unused",
            table.name, f"{made_for:,.0f}", f"{capacity:,}",
        )  # fmt: skip


def _require(holds: bool, argument: str, received: Any, required: str) -> None:
    if not holds:
        raise InputError(argument, received, required, "Change the engine's arguments, or serve without it.")


def _exporter(policy: str) -> Callable[[Mapping[str, int]], None] | None:
    """Return what copies the counters to Prometheus, or None where its client is not installed."""
    try:
        from prometheus_client import Gauge
    except ImportError:
        return None
    gauges = {name: gauge.labels(policy) for name, gauge in _gauges(Gauge).items()}

    def export(counters: Mapping[str, int]) -> None:
        for name, value in counters.items():
            gauges[name].set(value)

    return export


_made: dict[str, Any] = {}


def _gauges(gauge: Any) -> dict[str, Any]:
    """The gauges, made once per process: Prometheus refuses a name twice."""
    if not _made:
        words = {
            "iterations": "Iterations that ran",
            "admitted": "Newcomers admitted",
            "held_iterations": "Iterations in which somebody waited and nobody was admitted",
            "paused": "Residents passed over, summed over iterations",
            "unmatched": "Requests that match no row of the policy",
            "waiting": "Requests waiting now",
        }
        for name, text in words.items():
            _made[name] = gauge(f"fluidsched_{name}", text, ["policy"], multiprocess_mode="mostrecent")
    return _made
