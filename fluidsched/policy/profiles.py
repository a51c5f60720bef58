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
    lengths : (float64[J], float64[J]), optional
        Prompt and output of every type where each has one: sums over stages are then arithmetic series.

    Arrays are best in stage-major order, as `fold` says.
    """

    present: FloatArray
    prompt: FloatArray
    prompt_square: FloatArray
    padding: int
    lengths: tuple[FloatArray, FloatArray] | None = None

    @property
    def stages(self) -> int:
        """L, the longest output in iterations."""
        return int(self.present.shape[1])

    @cached_property
    def kv(self) -> tuple[FloatArray, FloatArray]:
        """h and v of the module's text, (J, L) each: tokens, tokens²."""
        extra = np.arange(self.stages, dtype=np.float64) + self.padding
        mean = extra * self.present
        variance = 2.0 * self.prompt
        variance += mean
        variance *= extra
        variance += self.prompt_square
        mean += self.prompt
        variance -= mean * mean
        return mean, np.maximum(variance, 0.0, out=variance)

    @cached_property
    def present_variance(self) -> FloatArray:
        """Variance of the presence itself, (J, L)."""
        return np.asarray(self.present * (1.0 - self.present))

    @property
    def is_fixed(self) -> bool:
        """Whether every type has one length, so that nothing varies."""
        return self.lengths is not None

    @cached_property
    def life_kv(self) -> FloatArray:
        """Mean KV added up over a request's stages, (J,) tokens."""
        if self.lengths is None:
            return np.asarray(self.kv[0].sum(axis=1))
        prompt, output = self.lengths
        return np.asarray(output * (prompt + self.padding) + output * (output - 1.0) / 2.0)

    @cached_property
    def _rises(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Life's variance of KV added up, and how far mean and variance climb over a life in all, (J,) each."""
        if self.lengths is None:
            mean, variance = self.kv
            return np.asarray(variance.sum(axis=1)), _climb(mean), _climb(variance)
        prompt, output = self.lengths
        none = np.zeros_like(prompt)
        return none, prompt + self.padding + output - 1.0, none

    def block_bound(self, k: int) -> tuple[FloatArray, FloatArray]:
        """What a block of k iterations holds at most in any iteration: mean and variance, (J,) each.

        A value is at most the mean of the k stages around it and what it climbs among them: so every f_j(r) is at
        most the life's sum over k, and the climbs of the whole life.
        """
        variance, mean_climb, variance_climb = self._rises
        return self.life_kv / k + mean_climb, variance / k + variance_climb

    def block(self, k: int) -> BlockProfile:
        """How stages add up in blocks of k iterations, 1 ≤ k ≤ L."""
        return BlockProfile(self, k)

    def spaced(self, lag: NDArray[np.int64]) -> SpacedProfile:
        """What requests hold when their entries are spaced, each at most `lag` (J,) iterations behind.

        A request whose prompt is cut in chunks is up to `lag` iterations behind its age: at age s it
        counts with the largest of the stages s − lag..s.
        """
        return SpacedProfile(self, lag)


@dataclass(frozen=True)
class SpacedProfile:
    """What is held where entries are spaced; J types, ages to M − 1.

    Attributes
    ----------
    stages : StageProfile
    lag : int64[J]
        Iterations that a request may be behind its age.
    """

    stages: StageProfile
    lag: NDArray[np.int64]

    @property
    def _alive(self) -> NDArray[np.int64]:
        """Ages of each type, (J,)."""
        if self.stages.lengths is not None:
            return np.asarray(self.stages.lengths[1].astype(np.int64) + self.lag)
        return np.asarray(np.count_nonzero(self.stages.present, axis=1) + self.lag)

    @cached_property
    def ages(self) -> int:
        """M, the ages of the type that has most."""
        return int(self._alive.max())

    @cached_property
    def by_age(self) -> FloatArray:
        """Mean and variance of the KV, mean and variance of the presence, (4, J, M); the last age comes last."""
        mean, variance = self.stages.kv
        rows = (mean, variance, self.stages.present, self.stages.present_variance)
        aligned = np.zeros((self.ages, len(rows), len(self.lag)))
        # At each age, counted so that the last is at the end.
        stage = np.arange(self.ages)[:, None] - (self.ages - self._alive)
        for e in np.unique(self.lag):
            mine = np.flatnonzero(self.lag == e)
            index = np.maximum(stage[:, mine], 0)
            for i, values in enumerate(rows):
                behind = _running_maximum(values[mine], int(e)).T
                found = np.take_along_axis(behind, np.minimum(index, len(behind) - 1), axis=0)
                aligned[:, i, mine] = np.where(stage[:, mine] >= 0, found, 0.0)
        return np.moveaxis(aligned, 0, -1)

    def bound(self, k: int) -> FloatArray:
        """Bounds per request admitted in any k iterations, (4, J): mean, variance of KV and of number.

        The largest of each run of k ages, counted back from the last, added up.
        """
        if self.stages.lengths is not None:
            count, held = self.of_fixed(np.full(len(self.lag), k))
            return np.array([held, np.zeros(len(held)), count, np.zeros(len(held))])
        by_age = np.moveaxis(self.by_age, -1, 0)
        rest = len(by_age) % min(k, len(by_age))
        bound = by_age[rest:].reshape(-1, min(k, len(by_age)), *by_age.shape[1:]).max(axis=1).sum(axis=0)
        if rest:
            bound += by_age[:rest].max(axis=0)
        return np.asarray(bound)

    def of_fixed(self, period: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Number and KV per request admitted in any `period` (J,) iterations, types of one length each; (J,) both.

        Ages run to M = o − 1 + lag, and at age a a request holds p + min(a, o − 1): so at the ages M − ik, i ≥ 0,
        the last tokens for i ≤ lag/k, then an arithmetic series.
        """
        assert self.stages.lengths is not None
        prompt = self.stages.lengths[0] + self.stages.padding
        last = self.stages.lengths[1].astype(np.int64) - 1
        count = (last + self.lag) // period + 1
        full = np.minimum(self.lag // period + 1, count)
        falling = count - full
        ages = falling * (last + self.lag) - period * (full + count - 1) * falling // 2
        return count.astype(np.float64), np.asarray(count * prompt + full * last + ages, dtype=np.float64)


@dataclass(frozen=True)
class BlockProfile:
    """Per request admitted at each decision: what its type holds in iteration r of a block, r = 0..k − 1.

    Each part is added up when first asked for. Types of one length each need no stages: of an entry's stages
    r, k + r, … the first c = ⌈(o − r)/k⌉ are below o, and hold c (p + r) + k c (c − 1)/2 tokens.

    Attributes
    ----------
    stages : StageProfile
    k : int
        Iterations per block.
    """

    stages: StageProfile
    k: int

    @property
    def padding(self) -> int:
        """Tokens added to every held amount."""
        return self.stages.padding

    @cached_property
    def present(self) -> FloatArray:
        """Residents in iteration r of a running type, (J, k)."""
        if self.stages.lengths is None:
            return fold(self.stages.present, self.k)
        iteration = np.arange(self.k, dtype=np.float64)[:, None]
        return np.maximum(np.ceil((self.stages.lengths[1] - iteration) / self.k), 0.0).T

    @cached_property
    def running_kv(self) -> FloatArray:
        """What these residents hold, f_j(r), (J, k) tokens."""
        if self.stages.lengths is None:
            return fold(self.stages.kv[0], self.k)
        present, iteration = self.present.T, np.arange(self.k, dtype=np.float64)[:, None]
        first = self.stages.lengths[0] + self.padding + iteration
        return np.asarray(present * (first + self.k * (present - 1.0) / 2.0)).T

    @property
    def entering(self) -> FloatArray:
        """Of the residents in iteration 0 those that enter, (J,)."""
        return np.asarray(self.stages.present[:, 0])

    @property
    def entering_kv(self) -> FloatArray:
        """What those hold that enter, (J,) tokens."""
        if self.stages.lengths is None:
            return np.asarray(self.stages.kv[0][:, 0])
        return np.asarray(self.stages.lengths[0] + self.padding)

    @cached_property
    def in_service(self) -> FloatArray:
        """Residents at the iteration of the block where they are most, the first, (J,)."""
        if self.stages.lengths is None:
            return np.asarray(self.stages.present[:, :: self.k].sum(axis=1))
        return np.asarray(self.present[:, 0])

    @cached_property
    def in_service_variance(self) -> FloatArray:
        """Variance of their number, at the iteration of the block where it is largest, (J,)."""
        return np.asarray(fold(self.stages.present_variance, self.k).max(axis=1))

    @cached_property
    def paused_kv(self) -> FloatArray:
        """What a paused type's residents hold, g_j, (J,) tokens: of stages ik, i ≥ 1, p + ik − 1."""
        return np.asarray((self.running_kv[:, 0] - self.entering_kv) - (self.in_service - self.entering))

    @cached_property
    def mean(self) -> FloatArray:
        """max(f_j(r), g_j): running or paused, whichever is more, (J, k) tokens."""
        return np.maximum(self.running_kv, self.paused_kv[:, None])

    @cached_property
    def variance(self) -> FloatArray:
        """max(φ_j(r), γ_j) likewise, (J, k) tokens²; none where lengths are fixed.

        A token less for whoever is present, a share q: v becomes v + (1 − q)(q − 2h), less than v since q ≤ h.
        """
        profile, k = self.stages, self.k
        if profile.lengths is not None:
            return np.broadcast_to(np.zeros(1), (len(profile.present), k))
        kv, variance = profile.kv
        running = fold(variance, k)
        if k == 1:  # whoever enters varies besides
            return np.asarray(running)
        present = profile.present[:, k::k]
        paused = variance[:, k::k] + (1.0 - present) * (present - 2.0 * kv[:, k::k])
        return np.asarray(np.maximum(running, np.maximum(paused, 0.0).sum(axis=1)[:, None]))

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


def _climb(values: FloatArray) -> FloatArray:
    """How far each row climbs in all from 0 along its columns: (J, L) → (J,)."""
    rises = np.diff(values, axis=1)
    return np.asarray(values[:, 0] + np.maximum(rises, 0.0, out=rises).sum(axis=1))


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
    lengths = prompts[:, 0], outputs[:, 0].astype(np.float64)
    return StageProfile(present, prompts * present, prompts**2 * present, padding, lengths)
