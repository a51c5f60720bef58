"""vLLM's real scheduler with a model runner that only counts, on a clock of its own: no GPU, no weights.

`serve` drives it over an arrival path. An iteration lasts what the server's iteration time says of the batch
vLLM chose; with `depth` 2 the next iteration is scheduled before the tokens of the last are known, as vLLM does
by default. What it returns can be set beside the iterations of the reference simulator.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fluidsched import ArrivalPath, PolicyTable, Server

OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 65_536,
}


def make_scheduler(
    folder: Path,
    table: PolicyTable | None,
    *,
    blocks: int,
    block_size: int = 1,
    budget: int = 8192,
    slots: int = 256,
    prefix_caching: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Scheduler:
    """The scheduler vLLM would make for these arguments; table None: vLLM's own."""
    if prefix_caching:
        init_none_hash(sha256)
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(OPT))
    scheduler_cls, additional = None, {}
    if table is not None:
        table.to_json(folder / "policy.json")
        additional = {"fluidsched": {"policy": str(folder / "policy.json"), **(settings or {})}}
        scheduler_cls = "fluidsched.integrations.vllm.FluidScheduler"
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, max_model_len=65_536),
        cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching),
        parallel_config=ParallelConfig(),
        scheduler_config=SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=budget,
            max_model_len=65_536,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=True,
            scheduler_cls=scheduler_cls,
        ),
        device_config=DeviceConfig("cpu"),
        additional_config=additional,
    )
    config.cache_config.num_gpu_blocks = blocks + 1  # vLLM keeps one for itself
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    chosen = config.scheduler_config.get_scheduler_cls()
    return chosen(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=block_size,
        log_stats=True,
    )


@dataclass
class Run:
    """What the engine did: per iteration {request: prompt tokens}, {requests decoding}; per request, times."""

    iterations: list[tuple[dict[int, int], set[int]]] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    first_token_s: dict[int, float] = field(default_factory=dict)
    finish_s: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    preemptions: int = 0


def serve(
    scheduler: Scheduler,
    path: ArrivalPath,
    server: Server,
    *,
    depth: int = 1,
    horizon: float = math.inf,
    abort_at: Mapping[int, float] | None = None,
    wake_s: float = 0.25,
    most: int = 1_000_000,
) -> Run:
    """Serve a path. `abort_at`: request -> time at which its client leaves; `wake_s`: pause of an idle engine."""
    now = 0.0
    scheduler.clock = lambda: now
    run = Run()
    coming = deque(range(len(path)))
    leaving = deque(sorted((time, i) for i, time in (abort_at or {}).items()))
    in_flight: deque[Any] = deque()
    targets: dict[str, int] = {}  # tokens a request must compute before it decodes, set at each admission
    calls = 0

    def process(output: Any, end_s: float) -> None:
        known = [name for name in output.num_scheduled_tokens if name in scheduler.requests]
        answer = reply(scheduler, output)
        for name, tokens in zip(answer.req_ids, answer.sampled_token_ids, strict=True):
            if tokens and name in known:
                run.first_token_s.setdefault(int(name), end_s)
                run.tokens[int(name)] = run.tokens.get(int(name), 0) + 1
        scheduler.update_from_output(output, answer)
        for name in known:
            if name not in scheduler.requests:
                run.finish_s.setdefault(int(name), end_s)

    while now < horizon and len(run.iterations) < most:
        calls += 1
        assert calls < 10 * most
        while coming and path.arrival_s[coming[0]] <= now:
            hashed = (
                scheduler.cache_config.block_size if scheduler.cache_config.enable_prefix_caching else None
            )
            scheduler.add_request(request_of(path, coming.popleft(), hashed))
        while leaving and leaving[0][0] <= now:
            scheduler.finish_requests([str(leaving.popleft()[1])], RequestStatus.FINISHED_ABORTED)
        output = scheduler.schedule()
        output.emits = _emitting(scheduler, output)
        if output.total_num_scheduled_tokens:
            batch, duration = _summarise(scheduler, output, targets, server)
            run.iterations.append(batch)
            run.starts_s.append(now)
            run.preemptions += len(output.preempted_req_ids or ())
            in_flight.append((output, now + duration))
            now += duration
            if len(in_flight) == depth:
                process(*in_flight.popleft())
            continue
        scheduler.update_from_output(output, reply(scheduler, output))
        if in_flight:
            process(*in_flight.popleft())
        elif not scheduler.has_unfinished_requests() and not coming:
            break
        else:
            instants = [now + wake_s] if scheduler.has_unfinished_requests() else []
            instants += [float(path.arrival_s[coming[0]])] if coming else []
            now = min(instants)
    while in_flight:
        process(*in_flight.popleft())
    return run


def request_of(path: ArrivalPath, i: int, block_size: int | None = None) -> Request:
    """Request i of a path as vLLM's engine core would hand it to its scheduler.

    With a block size its prompt is hashed in blocks: equal names are equal tokens, the rest is the request's own.
    """
    output = int(path.output_tokens[i])
    prompt = [1] * int(path.prompt_tokens[i])
    if block_size is not None and path.prompt_blocks is not None:
        names = path.prompt_blocks.of(i).tolist()
        tokens = path.prompt_blocks.block_tokens
        prompt[: tokens * len(names)] = [10 + name for name in names for _ in range(tokens)]
    extra: dict[str, Any] = {"fluidsched_output_tokens": output}
    if path.type is not None:
        extra["fluidsched_type"] = path.type_names[int(path.type[i])]
    return Request(
        request_id=str(i),
        prompt_token_ids=prompt,
        block_hasher=None if block_size is None else get_request_block_hasher(block_size, sha256),
        sampling_params=SamplingParams(max_tokens=output, ignore_eos=True, extra_args=extra),
        pooling_params=None,
        arrival_time=float(path.arrival_s[i]),
    )


def _emitting(scheduler: Scheduler, output: Any) -> set[str]:
    """Which of the scheduled requests get a token: those whose known tokens are all computed by then."""
    return {name for name in output.num_scheduled_tokens if not scheduler.requests[name].is_prefill_chunk}


def reply(scheduler: Scheduler, output: Any) -> ModelRunnerOutput:
    """What a model runner would answer: token 7 for everybody who gets one."""
    ids = list(output.num_scheduled_tokens)
    emits = output.emits if hasattr(output, "emits") else _emitting(scheduler, output)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={name: k for k, name in enumerate(ids)},
        sampled_token_ids=[[7] if name in emits else [] for name in ids],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def _summarise(
    scheduler: Scheduler, output: Any, targets: dict[str, int], server: Server
) -> tuple[tuple[dict[int, int], set[int]], float]:
    """The batch of an iteration and how long it lasts (rules 4 and 5 of the reference simulator)."""
    admitted = {
        *output.scheduled_cached_reqs.resumed_req_ids,
        *(new.req_id for new in output.scheduled_new_reqs),
    }
    prefill: dict[int, int] = {}
    decode: set[int] = set()
    attention = 0.0
    kv_tokens = 0
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        before = request.num_computed_tokens - tokens  # vLLM has advanced it already
        if name in admitted:
            targets[name] = request.num_tokens
        if before < targets[name]:
            prefill[int(name)] = tokens
            attention += tokens * (before + tokens / 2)
        else:
            decode.add(int(name))
            kv_tokens += before + 1
    prefill_tokens = sum(prefill.values())
    duration = max(
        c0 + c_pf * prefill_tokens + c_dec * len(decode) + c_kv * kv_tokens + c_attn * attention
        for c0, c_pf, c_dec, c_kv, c_attn in server.iteration_time.require_coefficients("a test").tolist()
    )
    return (prefill, decode), duration
