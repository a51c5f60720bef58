"""A policy table as command-line arguments of real engines, with what they cannot say.

Stock engines have a cap on requests, a token budget and little else; thresholds per type, gates, periods
and freezing need a scheduler of one's own. So an export is two things: the arguments, and the list of what
is lost. vLLM's names are those of version 0.33, SGLang's those of its server arguments in 2026
(documented, not tried on an engine).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluidsched.policy.table import PolicyTable

__all__ = ["EngineArguments", "sglang_arguments", "vllm_arguments"]


@dataclass(frozen=True)
class EngineArguments:
    """Arguments of an engine and what of the table they do not carry.

    Attributes
    ----------
    engine : str
        "vllm" or "sglang".
    arguments : mapping
        Name as in the engine's Python configuration → value. Only what the table sets; the rest is the
        engine's.
    lost : tuple of str
        What the engine will do differently from the table, one sentence each; empty if nothing.
    """

    engine: str
    arguments: Mapping[str, Any]
    lost: tuple[str, ...]

    def command_line(self) -> str:
        """The arguments as options of the engine's command line.

        Examples
        --------
        >>> from fluidsched.policy import baselines
        >>> baselines.vllm(max_in_service=86).to_vllm_args().command_line()
        '--max-num-seqs 86 --max-num-active-seqs 86 --max-num-batched-tokens 2048'
        """
        words = []
        for name, value in self.arguments.items():
            option = name.replace("_", "-")
            if value is True:
                words.append(f"--{option}")
            elif value is False:
                words.append(f"--no-{option}")
            else:
                words.append(f"--{option} {value}")
        return " ".join(words)


def _engine_arguments(engine: str, arguments: dict[str, Any], lost: list[str]) -> EngineArguments:
    return EngineArguments(engine, arguments, tuple(lost))


_AS_THEY_COME = "requests are admitted as they come. Run the table in a scheduler of its own."


def _lost_everywhere(table: PolicyTable) -> list[str]:
    """What no stock engine does."""
    lost = []
    if table.kind in ("wait", "nested-wait"):
        lost.append(f"Thresholds, blocks and freezing: {_AS_THEY_COME}")
    if table.kind == "gated":
        lost.append(f"Thresholds per type and period: {_AS_THEY_COME}")
    if table.kind == "faster_transformer":
        lost.append("Static batches: a request that finishes makes room for the next.")
    if table.lookahead.mode != "none":
        lost.append(f"Look-ahead admission ({table.lookahead.mode}): only what fits now is asked.")
    if any(row.max_hold_s is not None for row in table.types):
        lost.append("max_hold_s: without gates nothing is held.")
    if any(row.priority is not None for row in table.types):
        lost.append("Priorities of types: the engine's priority is a field of each request.")
    if table.kv_limit_tokens is not None:
        lost.append("kv_limit_tokens: admission may fill all KV memory.")
    if table.order != "fcfs":
        lost.append(f"Order {table.order!r}: first come, first served.")
    return lost


def vllm_arguments(table: PolicyTable) -> EngineArguments:
    """Arguments of vLLM; see `PolicyTable.to_vllm_args`."""
    arguments: dict[str, Any] = {}
    if table.max_in_service is not None:
        arguments["max_num_seqs"] = table.max_in_service
        arguments["max_num_active_seqs"] = table.max_in_service
    if table.token_budget is not None:
        arguments["max_num_batched_tokens"] = table.token_budget
    if table.watermark > 0.0:
        arguments["watermark"] = table.watermark
    if table.prefill_interval is not None:
        arguments["prefill_schedule_interval"] = table.prefill_interval
    if table.chunk_tokens is not None:
        arguments["long_prefill_token_threshold"] = table.chunk_tokens
    if not table.whole_prompt_admission:
        arguments["scheduler_reserve_full_isl"] = False
    lost = _lost_everywhere(table)
    if table.kind == "sarathi":
        lost.append("Decodes before chunks: running requests are served in the order of their admission.")
    if table.chunk_tokens is not None:
        lost.append("chunk_tokens: a request that is alone in the engine takes the whole token budget.")
    if table.kind == "vllm_v0":
        lost.append("Prompts before decodes: running requests come first (v0 was removed from the engine).")
    if table.preemption != "recompute":
        lost.append(f"Preemption by {table.preemption}: preempted requests are recomputed.")
    return _engine_arguments("vllm", arguments, lost)


def sglang_arguments(table: PolicyTable) -> EngineArguments:
    """Arguments of SGLang; see `PolicyTable.to_sglang_args`."""
    arguments: dict[str, Any] = {"schedule_policy": "fcfs"}
    lost = _lost_everywhere(table)
    if table.max_in_service is not None:
        arguments["max_running_requests"] = table.max_in_service
    if table.token_budget is not None:
        arguments["chunked_prefill_size"] = table.token_budget
        arguments["enable_mixed_chunk"] = True
        lost.append("The token budget counts prompt tokens; decodes come on top.")
    if table.watermark > 0.0:
        lost.append("watermark: admission reserves by schedule_conservativeness instead.")
    if table.prefill_interval is not None:
        lost.append("prefill_interval: prompts are taken whenever there is room.")
    if table.chunk_tokens is not None:
        lost.append("chunk_tokens: one prompt may take the whole budget.")
    if not table.whole_prompt_admission:
        lost.append("First-chunk admission: SGLang asks for room for the prompt and part of the output.")
    if table.preemption != "recompute":
        lost.append(f"Preemption by {table.preemption}: retracted requests are recomputed.")
    return _engine_arguments("sglang", arguments, lost)
