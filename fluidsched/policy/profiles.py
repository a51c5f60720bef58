r"""What a request holds at each stage of its life, and how the stages of a block add up.

**Stages.** A request of type j with prompt p is served in S = o iterations; in iteration s + 1 (stage s =
0, 1, …, S − 1) it holds p + s tokens of KV. Seen in advance, a request admitted s iterations of service
ago is still there with probability P(S > s) and then holds p + s. All that compiling needs is, per type
and stage,

    P(S > s),    E[p; S > s],    E[p²; S > s]        (E[X; A] = E[X·1_A]),

hence mean and variance of its KV, h(s) = E[(p + s); S > s] and v(s) = E[(p + s)²; S > s] − h(s)². Summed
over the stages, P gives E[S] and h gives E[W].

**Blocks.** When decisions come every k iterations and at most n_j requests of type j enter per decision,
those of one entry are at the same stage, and entries are k stages apart. In iteration r of a block (0 ≤ r
< k) they are at stages r, k + r, 2k + r, …, so that type j, full, holds in the mean n_j f_j(r) and with
variance n_j φ_j(r),

    f_j(r) = Σ_{i≥0} h_j(ik + r),        φ_j(r) = Σ_{i≥0} v_j(ik + r),

and, paused between blocks (those of stage ik have survived ik iterations and hold p + ik − 1),

    g_j = Σ_{i≥1} E[(p + ik − 1); S > ik],     γ_j likewise for the variance.

With lengths fixed per type the variances vanish and the sums are what is held, with certainty.

**Spacing.** When at most n_j enter in *any* k consecutive iterations, entries lie at stages at least k
apart, so at most one of them in each k consecutive stages. Cut the stages into runs of k, counted back
from the last: what the type holds is at most n_j Σ_i max of h over the i-th run in the mean. For fixed
lengths this is Σ_{i≥0, ik<S} (p + S − 1 − ik), which is reached.

With paged KV of b tokens a block every held amount is taken b − 1 tokens larger, an upper bound on
rounding up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_real
from fluidsched.workload import Workload

__all__ = [
    "BlockProfile",
    "SpacedProfile",
    "StageProfile",
    "fold",
    "mean_profile",
    "normal_quantile",
    "worst_profile",
]

FloatArray = NDArray[np.float64]


def normal_quantile(overflow_probability: float) -> float:
    """z with P(normal > z) = δ for 0 < δ ≤ 1/2; infinite for δ = 0.

    Examples
    --------
    >>> round(normal_quantile(0.01), 4)
    2.3263
    """
    delta = check_real(
        "overflow_probability",
        overflow_probability,
        minimum=0.0,
        maximum=0.5,
        remedy="Use 0 for a bound that holds with certainty.",
    )
    return math.inf if delta == 0.0 else -NormalDist().inv_cdf(delta)


@dataclass(frozen=True)
class StageProfile:
    """Presence and KV of a request per type and stage; L stages, the longest output's.

    Attributes
    ----------
    present : float64[J, L]
        P(S > s).
    prompt, prompt_square : float64[J, L]
        E[p; S > s] and E[p²; S > s], tokens and tokens².
    padding : int
        Tokens added to every held amount for paging: block size − 1, or 0.

    Arrays are best in stage-major order, as `fold` says.
    """

    present: FloatArray
    prompt: FloatArray
    prompt_square: FloatArray
    padding: int

    @property
    def stages(self) -> int:
        """L, the longest output in iterations."""
        return int(self.present.shape[1])

    def held(self, shift: int) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of its KV if it holds p + s + `shift` tokens (and the padding) at stage s."""
        extra = np.arange(self.stages, dtype=np.float64) + (shift + self.padding)
        mean = self.prompt + extra * self.present
        square = self.prompt_square + extra * (2.0 * self.prompt + extra * self.present)
        return mean, np.maximum(square - mean * mean, 0.0)

    @cached_property
    def kv(self) -> tuple[FloatArray, FloatArray]:
        """h and v of the module's text, (J, L) each: tokens, tokens²."""
        return self.held(0)

    @cached_property
    def paused_kv(self) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of its KV between iterations, before the stage's own token, (J, L) each."""
        return self.held(-1)

    @cached_property
    def present_variance(self) -> FloatArray:
        """Variance of the presence itself, (J, L)."""
        return np.asarray(self.present * (1.0 - self.present))

    @cached_property
    def is_fixed(self) -> bool:
        """Whether every type has one length, so that nothing varies."""
        return not self.kv[1].any() and not self.present_variance.any()

    def block(self, k: int) -> BlockProfile:
        """How stages add up in blocks of k iterations, 1 ≤ k ≤ L."""
        kv, variance = self.kv
        mean, present = fold(kv, k), fold(self.present, k)
        entering_kv, entering = kv[:, 0], self.present[:, 0]
        # Of stages ik, i ≥ 1, what is held before the stage's own token: p + ik − 1.
        paused = (mean[:, 0] - entering_kv) - (present[:, 0] - entering)
        if self.is_fixed:
            none = np.zeros(1)
            held_variance, number_variance = (
                np.broadcast_to(none, mean.shape),
                np.broadcast_to(none, len(mean)),
            )
        else:
            paused_variance = self.paused_kv[1][:, k::k].sum(axis=1)
            held_variance = np.maximum(fold(variance, k), paused_variance[:, None])
            number_variance = fold(self.present_variance, k).max(axis=1)
        return BlockProfile(
            mean=np.maximum(mean, paused[:, None]),
            variance=held_variance,
            in_service=present.max(axis=1),
            in_service_variance=number_variance,
            present=present,
            running_kv=mean,
            entering=entering,
            entering_kv=entering_kv,
            padding=self.padding,
        )

    def spaced(self, lag: NDArray[np.int64]) -> SpacedProfile:
        """What requests hold when their entries are spaced, each at most `lag` (J,) iterations behind.

        A request whose prompt is cut in chunks is up to `lag` iterations behind its age: at age s it
        counts with the largest of the stages s − lag..s.
        """
        mean, variance = self.kv
        rows = (mean, variance, self.present, self.present_variance)
        last = np.count_nonzero(self.present, axis=1) + lag
        width = int(last.max())
        aligned = np.zeros((width, len(rows), len(last)))
        stage = np.arange(width)[:, None] - (
            width - last
        )  # at each age, counted so that the last is at the end
        for e in np.unique(lag):
            mine = np.flatnonzero(lag == e)
            index = np.maximum(stage[:, mine], 0)
            for i, values in enumerate(rows):
                if self.is_fixed and i % 2:
                    continue  # nothing varies
                behind = _running_maximum(values[mine], int(e)).T
                found = np.take_along_axis(behind, np.minimum(index, len(behind) - 1), axis=0)
                aligned[:, i, mine] = np.where(stage[:, mine] >= 0, found, 0.0)
        return SpacedProfile(np.moveaxis(aligned, 0, -1))


@dataclass(frozen=True)
class SpacedProfile:
    """Ages of a request, the last one in the last column.

    Attributes
    ----------
    by_age : float64[4, J, M]
        Mean and variance of its KV, mean and variance of its presence.
    """

    by_age: FloatArray

    def bound(self, k: int) -> FloatArray:
        """Bounds per request admitted in any k iterations, (4, J): mean, variance of KV and of number.

        The largest of each run of k ages, counted back from the last, added up.
        """
        by_age = np.moveaxis(self.by_age, -1, 0)
        rest = len(by_age) % min(k, len(by_age))
        bound = by_age[rest:].reshape(-1, min(k, len(by_age)), *by_age.shape[1:]).max(axis=1).sum(axis=0)
        if rest:
            bound += by_age[:rest].max(axis=0)
        return np.asarray(bound)


@dataclass(frozen=True)
class BlockProfile:
    """Per request admitted at each decision: what its type holds in iteration r of a block, r = 0..k − 1.

    Attributes
    ----------
    mean, variance : float64[J, k]
        max(f_j(r), g_j) and max(φ_j(r), γ_j): running or paused, whichever is more. Tokens, tokens².
    in_service, in_service_variance : float64[J]
        Residents, at the iteration of the block where they are most.
    present, running_kv : float64[J, k]
        Residents in iteration r of a running type and what they hold, f_j(r).
    entering, entering_kv : float64[J]
        Of these the share that enters, in iteration 0.
    padding : int
        Tokens added to every held amount.
    """

    mean: FloatArray
    variance: FloatArray
    in_service: FloatArray
    in_service_variance: FloatArray
    present: FloatArray
    running_kv: FloatArray
    entering: FloatArray
    entering_kv: FloatArray
    padding: int

    @cached_property
    def decodes(self) -> FloatArray:
        """Decodes in iteration r in the mean, (J, k)."""
        decodes = self.present.copy(order="K")
        decodes[:, 0] -= self.entering
        return decodes

    @cached_property
    def decode_kv(self) -> FloatArray:
        """KV tokens that these decodes read, (J, k)."""
        read = self.running_kv - self.padding * self.present
        read[:, 0] -= self.entering_kv - self.padding * self.entering
        return np.asarray(read)

    @property
    def first_iteration(self) -> tuple[FloatArray, FloatArray]:
        """Decodes and the KV they read in the first iteration alone, (J,) each."""
        decodes = self.present[:, 0] - self.entering
        held = self.running_kv[:, 0] - self.padding * self.present[:, 0]
        return decodes, held - (self.entering_kv - self.padding * self.entering)


def fold(values: FloatArray, k: int) -> FloatArray:
    """Sum the columns r, k + r, 2k + r, … : (…, J, L) → (…, J, k), 1 ≤ k ≤ L.

    Fast, and as its result, in stage-major order (columns lie together): whole blocks are added at once.
    """
    by_stage = np.moveaxis(values, -1, 0)
    whole = len(by_stage) // k * k
    result = by_stage[:whole].reshape(-1, k, *by_stage.shape[1:]).sum(axis=0)
    result[: len(by_stage) - whole] += by_stage[whole:]
    return np.moveaxis(result, 0, -1)


def _running_maximum(values: FloatArray, lag: int) -> FloatArray:
    """Largest of the last lag + 1 columns, with `lag` more columns at the end: (J, L) → (J, L + lag)."""
    result, width = values, 1  # windows of `width`, doubled, the last ones overlapping
    while width <= lag:
        shift = min(width, lag + 1 - width)
        wider = np.zeros((result.shape[1] + shift, len(result))).T
        wider[:, : result.shape[1]] = result
        np.maximum(wider[:, shift:], result, out=wider[:, shift:])
        result, width = wider, width + shift
    return result


def mean_profile(workload: Workload, padding: int = 0) -> StageProfile:
    """Stage profile of a workload's types in expectation over their joint length laws.

    Examples
    --------
    >>> import fluidsched as fs
    >>> chat = fs.Workload([fs.RequestType("chat", arrival_rate=1.0, prompt_tokens=512, output_tokens=21)])
    >>> profile = mean_profile(chat)
    >>> [float(total) for total in (profile.kv[0].sum(), profile.block(7).mean[0, -1])]
    [10962.0, 1575.0]
    """
    if all(t.law.is_fixed for t in workload.types):
        return worst_profile(workload, padding)
    points = workload.stacked_points
    prompts = points.prompt_tokens.astype(np.float64)
    parts = [(points.law_of_point, points.output_tokens, points.weights, prompts, prompts**2)]
    for j in np.setdiff1d(np.arange(len(workload)), points.law).tolist():
        profile = workload.types[j].law.output_profile()
        parts.append((np.full(len(profile[0]), j), *profile))
    types, outputs, weights, mean, square = (np.concatenate(part) for part in zip(*parts, strict=True))
    stages = int(outputs.max())
    cells = (outputs - 1) * len(workload) + types

    def beyond(mass: FloatArray) -> FloatArray:
        """Mass of the outputs above s, for s = 0..L − 1: reverse cumulative sums."""
        table = np.bincount(cells, mass, minlength=len(workload) * stages).reshape(stages, len(workload))
        return np.asarray(np.cumsum(table[::-1], axis=0, dtype=np.float64)[::-1].T)

    present = np.minimum(beyond(weights), 1.0)
    present[:, 0] = 1.0
    return StageProfile(present, beyond(weights * mean), beyond(weights * square), padding)


def worst_profile(workload: Workload, padding: int = 0) -> StageProfile:
    """Stage profile with every request as long as its type allows: p_max and o_max tokens."""
    prompts = workload.max_prompt_tokens.astype(np.float64)[:, None]
    outputs = workload.max_output_tokens[:, None]
    present = np.asfortranarray((np.arange(outputs.max()) < outputs).astype(np.float64))
    return StageProfile(present, prompts * present, prompts**2 * present, padding)
