"""What one request of each type takes from the server, in expectation over the type's lengths.

A request with p prompt and o output tokens is served in o iterations and holds p + k − 1 KV tokens in
iteration k. For every affine piece of the iteration time its *busy work* is the time it adds over its
lifetime,

    w = c_pf·p + c_dec·(o − 1) + c_kv·(W − p) + c_attn·p²/2,      W = Σ_{k=1..o} (p + k − 1).

With c tokens of the prompt in the prefix cache, p − c are prefilled and attend to all before them:

    w = c_pf·(p − c) + c_dec·(o − 1) + c_kv·(W − p) + c_attn·(p² − c²)/2.

Decodes read the whole prompt, and it is held from the first iteration on: W is as without a cache.

With KV in blocks of b tokens a request holding m tokens takes b⌈m/b⌉ of memory. Since Σ_{m=1..n} b⌈m/b⌉ =
n²/2 + nb/2 + g(n)/2 with g(n) = r(b − r), r = n mod b, the rounded KV work has the expectation

    W_b = W + o(b − 1)/2 + ( g(p + o − 1) − g(p − 1) )/2.

A prompt prefilled in chunks of q tokens takes K = ⌈(p − c)/q⌉ prefill iterations and holds c + i·q tokens in
the i-th but the last: K − 1 more iterations and (K − 1)c + q K(K − 1)/2 more KV work (each c + i·q rounded up
to blocks where there are any). The busy work stays as it is: the tokens and the attention are the same
however the prompt is cut. A longer prefix that leaves as many chunks is held along with each of them, so in
chunks, and only there, more cached tokens can take a little more memory.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fluidsched.errors import InputError
from fluidsched.server import IterationTime
from fluidsched.server.pool import Stage
from fluidsched.workload import Workload
from fluidsched.workload.lengths import IndependentLengths, JointLaw, LengthLaw

__all__ = ["Stage", "block_kv_work", "busy_work", "chunk_overhead"]


def busy_work(
    workload: Workload, iteration_time: IterationTime, stage: Stage = "whole"
) -> NDArray[np.float64]:
    """Return w of every piece and type: seconds a request adds to its iterations, beyond their base.

    Parameters
    ----------
    workload : Workload
        J types.
    iteration_time : IterationTime
        I affine pieces.
    stage : {"whole", "prefill", "decode"}
        Which part of a request's life is counted.

    Returns
    -------
    ndarray of shape (I, J)
        Seconds per request.

    Raises
    ------
    InputError
        If the iteration time is a function.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=10, output_tokens=3)])
    >>> busy_work(workload, fs.IterationTime.affine(1.0, 2.0, 3.0, 5.0, 7.0)).tolist()
    [[491.0]]
    """
    coefficients = iteration_time.require_coefficients("the fluid program")
    prompt = workload.mean_prompt_tokens
    counts = np.stack(
        [
            workload.mean_prefill_tokens,
            workload.mean_output_tokens - 1.0,
            workload.kv_work - prompt,
            workload.prefill_attention,
        ]
    )
    counts *= np.array(_COUNTED[stage])[:, None]
    with np.errstate(over="ignore"):
        work = np.asarray(coefficients[:, 1:] @ counts, dtype=np.float64)
    if not np.isfinite(work).all():
        raise InputError("iteration_time", iteration_time, "give the workload's requests finite times")
    return work


# Whether a stage has prefilled tokens, decoded tokens, KV reads, prefill attention.
_COUNTED: dict[Stage, tuple[float, ...]] = {
    "whole": (1.0, 1.0, 1.0, 1.0),
    "prefill": (1.0, 0.0, 0.0, 1.0),
    "decode": (0.0, 1.0, 1.0, 0.0),
}


def block_kv_work(workload: Workload, block_size: int | None, stage: Stage = "whole") -> NDArray[np.float64]:
    """Return E[W] with every request's KV rounded up to whole blocks, token·iterations, shape (J,).

    Parameters
    ----------
    workload : Workload
        J types.
    block_size : int or None
        Tokens per block; None: single tokens.
    stage : {"whole", "prefill", "decode"}
        Which part of a request's life is counted.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=15, output_tokens=3)])
    >>> block_kv_work(workload, 16).tolist()  # holds 15, 16, 17 tokens: 16 + 16 + 32
    [64.0]
    """
    block = block_size or 1
    whole = workload.kv_work
    if block > 1:
        remainder = np.array([_remainder(member.law, block) for member in workload.types])
        whole = whole + workload.mean_output_tokens * ((block - 1) / 2) + remainder
    if stage == "whole":
        return np.asarray(whole, dtype=np.float64)
    laws = [member.law.prompt_law for member in workload.types]
    prefill = np.array([float(law.weights @ (-(-law.values // block) * block)) for law in laws])
    return prefill if stage == "prefill" else np.asarray(whole - prefill, dtype=np.float64)


def _remainder(law: JointLaw, block_size: int) -> float:
    """E[ g(p + o − 1) − g(p − 1) ] / 2, from the residues of p and o alone when these are independent."""
    if isinstance(law, IndependentLengths):
        prompt, prompt_weight = _residues(law.prompt, block_size)
        output, output_weight = _residues(law.output, block_size)
        last = _excess(prompt[:, None] + output - 1, block_size)
        first = _excess(prompt - 1, block_size)
        return float(prompt_weight @ (last @ output_weight - first)) / 2
    prompts, outputs, weights = law.atoms()
    difference = _excess(prompts + outputs - 1, block_size) - _excess(prompts - 1, block_size)
    return float(weights @ difference) / 2


def _residues(law: LengthLaw, block_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    residues, inverse = np.unique(law.values % block_size, return_inverse=True)
    return residues, np.asarray(np.bincount(inverse, law.weights), dtype=np.float64)


def _excess(tokens: NDArray[np.int64], block_size: int) -> NDArray[np.float64]:
    residue = (tokens % block_size).astype(np.float64)
    return residue * (block_size - residue)


def chunk_overhead(
    workload: Workload, chunk_tokens: int, block_size: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the iterations and the KV work that prefilling in chunks adds to a request, both of shape (J,).

    Parameters
    ----------
    workload : Workload
        J types.
    chunk_tokens : int
        Tokens per chunk, q.
    block_size : int, optional
        Tokens per KV block.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=1000, output_tokens=3)])
    >>> [x.tolist() for x in chunk_overhead(workload, 400)]  # 400, then 800 tokens held before the last chunk
    [[2.0], [1200.0]]
    """
    iterations, kv_work = np.zeros(len(workload)), np.zeros(len(workload))
    for j, member in enumerate(workload.types):
        law = member.law.prompt_law
        tokens, one_more = member.cached_tokens()
        for cached, share in ((tokens, 1.0 - one_more), (tokens + 1, one_more)):
            possible = share > 0.0
            if not possible.any():
                continue
            weight = (law.weights * share)[possible]
            count = -(-(law.values - cached)[possible] // chunk_tokens) - 1
            iterations[j] += float(weight @ count)
            kv_work[j] += float(weight @ _chunks_held(count, cached[possible], chunk_tokens, block_size or 1))
    return iterations, kv_work


def _chunks_held(
    count: NDArray[np.int64], cached: NDArray[np.int64], chunk: int, block: int
) -> NDArray[np.float64]:
    """Σ_{i=1..count} block·⌈(cached + i·chunk)/block⌉.

    What rounding adds repeats with period block/gcd(chunk, block), and depends on the residue of `cached`.
    """
    whole = count.astype(np.float64)
    held = whole * cached + chunk * whole * (whole + 1) / 2
    period = block // math.gcd(chunk, block)
    residues, place = np.unique(cached % block, return_inverse=True)
    for r, residue in enumerate(residues.tolist()):
        excess = -(residue + np.arange(1, period + 1) * chunk) % block
        below = np.concatenate([[0], np.cumsum(excess)])
        mine = place == r
        held[mine] += count[mine] // period * below[-1] + below[count[mine] % period]
    return np.asarray(held, dtype=np.float64)
