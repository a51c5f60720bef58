r"""The compiled loops of the kernel: event to event instead of token to token.

Everything that numba compiles is in this one file, because its cache looks at one file's date only: a change
here recompiles everything, and nothing stale is ever run. In order: durations of runs, the calendar of
completions, the state, what the rules share, look-ahead, `continuous` (the rules in which everybody in service
runs), `wait` and `nested`. Rule numbers are those of `fluidsched.simulation.reference`, which these loops repeat.

**Durations.** While n requests decode and nobody enters or leaves, iteration r = 0, 1, … of the run reads
m + n r tokens of KV, so with affine pieces (c0, c_pf, c_dec, c_kv, c_attn) it lasts

    T(r) = max_i ( a_i + b_i r ),    a_i = c0_i + c_dec_i n + c_kv_i m,    b_i = c_kv_i n,

a convex, piecewise linear function of r. Between two crossings one piece rules, and a stretch of q
iterations that starts with duration a and grows by b per iteration lasts q a + b q(q - 1)/2. If residents
hold h tokens of KV in its first iteration and n more in each next one, the integral of KV over it is

    a h q + (a n + b h) q(q - 1)/2 + b n (q - 1)q(2q - 1)/6.

`decode_run` adds stretches up, and stops at the first iteration whose end is at or after an instant: the root
of a quadratic, with a look at its neighbours in the arithmetic of the sum itself.

**Clocks and calendars.** Requests that always run together share a clock g that ticks once per iteration. A
decode stores once

    base = (KV tokens it holds) - g,        key = reading of the clock at which it finishes,

and holds base + g from then on; the sums over a group, n and Σ (base + g), change by addition. With blocks
of b tokens a group's decodes are also counted by base mod b: those with base + g ≡ 0 take a block next. Day
`key mod D` of the group's calendar keeps its requests in a doubly linked list, one bit per day says
whether the list is empty, and one per 64 days whether all of theirs are, so adding and removing take constant
time and finding the next completion one operation per 4 096 ticks passed over. Requests more than D ticks away
share a day with nearer ones; a visitor of the day leaves them. `continuous` needs one group; `wait` has one per
row, because a row's residents all move or all stand still.

**Gaps between tokens.** A decode that also ran in the iteration before has its next token one iteration later:
n gaps of T(r) in iteration r. They are counted in the buckets of `histogram`; a run crosses few of them, mostly
none, and the iterations it spends in one are a quotient. Exceptions, moved from T(r) to where they belong: a decode
that the budget passed over (`stalled`: its last token), a row or segment that a block left out (the group's
`last`), a request that stood still before a segment or was preempted and emits again (its `served`).

**Segments.** So do those of a segment of `nested-wait`, but for the queue at its first position: a run of
segment k takes all who are inside and n_k of its queue. So there is a group per segment and, before it, a
list of residents who stand still. A request's next date in its group is its last token or the segment's
end, where it joins the next list: a few operations per segment that it reaches, however long it stays.
Admission is in the order of the path, preemption in the opposite one; so nobody overtakes, every list is in
order of arrival, and those of one cohort, put on one day one after another, are found there in reverse.

**Looking ahead.** On its clock a decode with base B, believed to finish at reading κ, is forecast to hold B + t
at every reading t ≤ κ and nothing later. So what is forecast for t,

    M(t) = Σ_{κ ≥ t} (B + t) = (how many κ ≥ t) t + (their Σ B),

does not change with the clock: only entering, leaving early and standing still change it, and an end that passes
changes nothing that is still ahead. M is largest at some κ. A segment tree over t (leaf t: the ends at t) keeps
in every node the number n of ends in it, their Σ B, and a bound on what they alone amount to at any of its t,

    peak(node) = max( peak(right), peak(left) + n(right) t_last(left) + ΣB(right) ),     exact in a leaf,

so an end is put in or taken out along one path, log2 of the longest length ahead. A newcomer is put in, and taken
out again if then M(t) exceeds the limit at a t that is ahead: from the latest t to the earliest, with the sums of
all that end later at hand, subtrees whose bound is within the limit are passed over whole. A bound takes ends at the
last t of a left subtree instead of where that is largest; so for a node of w readings, with N ends in it and after
it, it is too large by N(w − 1) at most, and a check looks into a node in vain only if the forecast there is within
N(w − 1) of the limit. Where the forecast falls off from its largest value by N and more per reading (what ends holds
much beside how fast the others grow) that is a node or two of each width: log2 of the length again. Around a smooth
maximum it is the root of the length, and where ends keep the forecast level, just below the limit, every node above
one, whenever somebody is checked, with no amortising: so O(log) is what happens, not what must. Counted with 128
residents of about 1 000 tokens and the limit at the very maximum: 11 nodes at length 64, 19 at 1 024, 40 (at most 65)
at 8 192; level forecasts: all 2n where something ends at each reading (`tests/simulation/test_forecast_tree.py`).
The t found is a witness, and is tried first the next time. A newcomer asks for less at it by one token per
iteration that passes, so who is refused need not be asked again before that adds up to the excess, or t has come,
or somebody leaves: with those who are refused, too, the loop goes from event to event. A law of m lengths puts m
ends in, each with its share, m updates that share the upper parts of their paths; where one passes, those left
weigh more. With blocks of b tokens ⌈(B + t)/b⌉ is linear in t only along t ≡ ρ mod b: there are b trees, one per ρ.
`shortest_first` keeps the waiting of a row in a binary heap. All this is compiled only for runs that need it:
for others the argument `ahead` is None, and numba drops what hangs on it.

**Events.** At a decision the rule serves the running, preempts, admits. If prompts are being computed, one
iteration is run; else as many as nothing can change in: until the next completion, the iteration memory
ends at, the opening of an admission window, the end of a block, or the first end at or after an arrival
that could enter, a hold time, the first iteration in which look-ahead may let in whom it refused, the horizon,
the end of the warm-up or a sampling instant. Waking for nothing
is harmless: the decision is made again and comes out the same. That is how `_glide` is possible, a short loop for
the decisions of one row in which all fit and nothing is held up: at whatever it does not know it stops, with the
decision half made if need be, and `continuous` makes it again.

**A prefix cache that fills.** Blocks are numbered anew from 0, each with the number of its users, or its place in
a list of idle ones, the oldest first. Memory is counted for every resident as if nothing were shared, and `shared`
is what that counts too often; so a group's sums stay what they are. While nobody enters or leaves only the room
for idle blocks shrinks, with memory in use, so dropping waits for the end of a run of decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llvmlite.ir import Constant, IntType  # type: ignore[import-untyped]
from numba import config, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fluidsched.simulation.code_cache import cached

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_Function = TypeVar("_Function", bound=Callable[..., Any])


# The loops allocate nothing, so numba's memory runtime is off: counting references to arrays took three
# quarters of the time. Integer division by zero needs no check: divisors are counts of at least one.
_SHARED: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def _compile(**options: Any) -> Callable[[_Function], _Function]:
    """A decorator that compiles, with the options all functions here share, and keeps the function's type."""

    def decorate(function: _Function) -> _Function:
        compiled: _Function = njit(**_SHARED, **options)(function)
        return compiled

    return decorate


def _loop(function: _Function) -> _Function:
    """Only the loops are called from Python and cached; their parts are compiled into them."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        # Interpreted: products that find a bit wrap around as compiled integers do, without NumPy's warning.
        wrapped: _Function = np.errstate(over="ignore")(function)
        return wrapped
    return cached(function, _SHARED)


_part = _compile(no_cpython_wrapper=True, no_cfunc_wrapper=True)
_inline = _compile(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)

NOBODY = -1
FAR = 1 << 62
BENT = -1.0
TINY = 1e-300


def _count_trailing_zeros() -> Callable[[int], int]:
    """Position of the lowest one of 64 bits, any if there is none: an instruction that numba gives no name."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return lambda word: (int(word & -word) & (2**64 - 1)).bit_length() - 1

    @intrinsic
    def lowest(context: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], Constant(IntType(1), 0))

        return types.int64(types.int64), generate

    found: Any = lowest
    return found


_lowest = _count_trailing_zeros()


def _promise() -> Callable[[int], int]:
    """An index, promised not to be negative: else every access is compiled to count from the end if it is."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return lambda index: index

    @intrinsic
    def at(context: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.assume(builder.icmp_signed(">=", arguments[0], Constant(arguments[0].type, 0)))
            return arguments[0]

        return types.int64(types.int64), generate

    promised: Any = at
    return promised


_at = _promise()

#: A number that is no literal: numba compiles a function once more for a literal argument.
_int: Any = np.int64


# --------------------------------------------------------------------------- durations of runs


@_inline
def batch_time(coef: Floats, n_pf: int, n_dec: int, k_dec: int, q_pf: float) -> float:
    """Duration of one iteration, s: the largest of the affine pieces."""
    longest = coef[0, 0] + coef[0, 1] * n_pf + coef[0, 2] * n_dec + coef[0, 3] * k_dec + coef[0, 4] * q_pf
    for i in range(1, coef.shape[0]):
        duration = (
            coef[i, 0] + coef[i, 1] * n_pf + coef[i, 2] * n_dec + coef[i, 3] * k_dec + coef[i, 4] * q_pf
        )
        longest = max(longest, duration)
    return longest


@_inline
def _stretch(coef: Floats, n: int, m: int, r: int, last: int) -> tuple[float, float, int]:
    """Duration and slope of iteration r; the first one after it, at most `last`, with another piece."""
    b = coef[0, 3] * n
    a = coef[0, 0] + coef[0, 2] * n + coef[0, 3] * m
    value = a + b * r
    for i in range(1, coef.shape[0]):
        b_i = coef[i, 3] * n
        a_i = coef[i, 0] + coef[i, 2] * n + coef[i, 3] * m
        value_i = a_i + b_i * r
        if value_i > value or (value_i == value and b_i > b):
            a, b, value = a_i, b_i, value_i
    stop = last
    for i in range(coef.shape[0]):
        b_i = coef[i, 3] * n
        if b_i > b:
            crossing = (a - (coef[i, 0] + coef[i, 2] * n + coef[i, 3] * m)) / (b_i - b)
            if crossing < stop:
                stop = min(stop, max(r + 1, math.ceil(crossing)))
    return value, b, stop


@_inline
def decode_run(
    coef: Floats, n: int, m: int, held: int, start: float, instant: float, k: int
) -> tuple[int, float, float, float, float, float]:
    """Decode iterations until the first end at or after `instant`, at most k, that begin at `start`.

    `m` tokens are read by the n decodes in the first iteration, `held` by all residents. Returns the number
    of iterations, their duration (s), the integral of KV over them (token·s), the durations of the first
    and the last of them, and by how much each is longer than the one before, `BENT` if that is not one number.
    """
    value, slope, stop = _stretch(coef, n, m, _int(0), k)
    q = float(k)
    pairs = 0.5 * q * (q - 1.0)
    duration = q * value + slope * pairs
    if stop < k or start + duration >= instant:
        return _bent_run(coef, n, m, held, start, instant, k)
    area = _area(value, slope, n, float(held), q, pairs)
    return k, duration, area, value, value + slope * (q - 1.0), slope


@_inline
def _area(value: float, slope: float, n: int, kv: float, q: float, pairs: float) -> float:
    """Integral of KV over q iterations, `pairs` pairs of which, that begin with `kv` tokens, token·s."""
    area = value * kv * q + (value * n + slope * kv) * pairs
    return area + slope * n * (pairs * (2.0 * q - 1.0) * (1.0 / 3.0))


@_part
def _bent_run(
    coef: Floats, n: int, m: int, held: int, start: float, instant: float, k: int
) -> tuple[int, float, float, float, float, float]:
    """`decode_run` over several stretches, or one that the instant ends."""
    duration = area = first = 0.0
    r = _int(0)
    while True:
        value, slope, stop = _stretch(coef, n, m, r, k)
        straight = r == 0
        if straight:
            first = value
        q = float(stop - r)
        through = duration + (q * value + slope * (0.5 * q * (q - 1.0)))
        reached = start + through >= instant
        if reached:
            q = _first_end(value, slope, start, duration, instant, q)
            through = duration + (q * value + slope * (0.5 * q * (q - 1.0)))
        duration = through
        area += _area(value, slope, n, float(held + n * r), q, 0.5 * q * (q - 1.0))
        r += int(q)
        if reached or r == k:
            return r, duration, area, first, value + slope * (q - 1.0), slope if straight else BENT


@_inline
def _first_end(value: float, slope: float, start: float, before: float, instant: float, most: float) -> float:
    """Iterations of a stretch, 1 … most, after which `instant` is reached; it is after `most` of them.

    The stretch follows `before` seconds of the run that began at `start`. The root of the quadratic is looked
    at in the arithmetic of the run itself: its neighbours decide.
    """
    remaining = instant - start - before
    if remaining <= 0.0 or most == 1.0:
        return 1.0
    first = value - 0.5 * slope
    x = float(math.ceil(2.0 * remaining / (first + math.sqrt(first * first + 2.0 * slope * remaining))))
    x = min(max(x, 1.0), most)
    while x > 1.0:
        y = x - 1.0
        if start + (before + (y * value + slope * (0.5 * y * (y - 1.0)))) < instant:
            break
        x = y
    while x < most and start + (before + (x * value + slope * (0.5 * x * (x - 1.0)))) < instant:
        x += 1.0
    return x


# --------------------------------------------------------------------------- the calendar of completions

_WORD = 64
_LARGEST = 1 << 17


def calendar_days(longest: int, calendars: int) -> int:
    """Return D, days of a calendar: a power of two ≥ 64, above `longest` unless that is too large."""
    days = _WORD
    while days <= longest and days * calendars < _LARGEST:
        days *= 2
    return days


def calendar_words(days: int) -> int:
    """Return how many words the bits of a calendar take: one per 64 days, then one per 64 of these."""
    return (days >> 6) + max(days >> 12, 1)


_words = _inline(calendar_words)


@_inline
def calendar_add(heads: Ints, bits: Ints, slots: Records, days: int, group: int, key: int, slot: int) -> None:
    """Put `slot` on the day of `key` in the group's calendar of so many days."""
    place = _at(key & (days - 1))
    day = _at(group * days + place)
    head = heads[day]
    slots[slot].later = head
    slots[slot].earlier = NOBODY
    if head == NOBODY:
        first = group * _words(days)
        bits[_at(first + (place >> 6))] |= 1 << (place & 63)
        bits[_at(first + (days >> 6) + (place >> 12))] |= 1 << ((place >> 6) & 63)
    else:
        slots[_at(head)].earlier = slot
    heads[day] = slot


@_inline
def calendar_remove(
    heads: Ints, bits: Ints, slots: Records, days: int, group: int, key: int, slot: int
) -> None:
    """Take `slot` off the day of `key`."""
    before, after = slots[slot].earlier, slots[slot].later
    if after != NOBODY:
        slots[_at(after)].earlier = before
    if before != NOBODY:
        slots[_at(before)].later = after
        return
    place = _at(key & (days - 1))
    heads[_at(group * days + place)] = after
    if after == NOBODY:
        first = group * _words(days)
        word, upper = _at(first + (place >> 6)), _at(first + (days >> 6) + (place >> 12))
        left = bits[word] & ~(1 << (place & 63))
        bits[word] = left
        bits[upper] &= ~(int(left == 0) << ((place >> 6) & 63))


@_inline
def calendar_next(bits: Ints, days: int, group: int, clock: int) -> int:
    """Ticks from `clock` to the next day with anybody on it, 1 … days, in the group's calendar of so many days.

    Whether it is in the same word as tomorrow no processor foresees, so both answers are computed and one is chosen
    by arithmetic.
    """
    start = _at((clock + 1) & (days - 1))
    first = _at(group * _words(days))
    word = start >> 6
    ahead = -1 << (start & 63)
    near = bits[_at(first + word)] & ahead
    upper = word >> 6
    far = bits[_at(first + (days >> 6) + upper)] & (-2 << (word & 63))
    if near | far == 0:
        far = 0
        while far == 0:
            upper = (upper + 1) & (max(days >> 12, 1) - 1)
            far = bits[_at(first + (days >> 6) + upper)]
    beyond = -int(near == 0)
    word = (word & ~beyond) | (((upper << 6) + _lowest(far)) & beyond)
    day = (word << 6) + _lowest(bits[_at(first + word)] & (ahead | beyond))
    return ((day - clock - 1) & (days - 1)) + 1


# --------------------------------------------------------------------------- what the loops read and write
#
# State lies in arrays of records rather than one array per field: a resident's numbers share two cache lines,
# and a function that is not inlined is handed one array header instead of a dozen.


def _record_type(integers: str, reals: str = "") -> np.dtype[np.void]:
    fields: list[tuple[str, type]] = [(name, np.int64) for name in integers.split()]
    fields += [(name, np.float64) for name in reals.split()]
    # Of this class fields are attributes in plain Python, too: loops that are interpreted need that.
    return np.dtype((np.record, fields))


#: The limits of `fluidsched.simulation.limits`, the rule's other numbers and flags, the measured window, and which
#: replica of a cluster it is.
RULES = _record_type(
    "capacity admission block slots budget chunk reserve interval block_iterations whole_prompt decodes_first"
    " whole_prompts prompts_alone static swap gated restart handed gap_shift gap_first gap_last by_length replica",
    "horizon warmup swap_bandwidth",
)

#: A row of the table (hold inf: none). rank: of its priority; turn: at place i the i-th row by (priority,
#: row). Its newcomers are order[head:tail] but for `gone` that have left, never the first of them. `gated`:
#: recent[first:first + ring] is a ring of the iterations
#: of its last admissions, of which there were `admissions` and `passed` are outside the window; quota: how
#: many more may enter in this decision.
ROW = _record_type(
    "threshold gate period rank turn head tail gone first ring admissions passed quota",
    "hold",
)

#: A resident. Slots are linked in the order of admission; `newer` also links the vacant ones. Prefilling:
#: `done` of `target` tokens are computed, `chunk` more in this iteration. Decoding: origin and key; earlier,
#: later: its day. resumed: output tokens it had when admitted. partial: at place i the slot of the i-th that
#: prefills, in the order of admission. stalled: when a decode that was passed over emitted its last token, else
#: `AT_ONCE`; under `wait` of those whose KV comes back
#: in this decision. `nested-wait`: its segment; where `earlier` and `later` link the queue of a segment, `decodes` is
#: 2, `origin` the KV tokens held and `resumed` the output tokens produced. In a segment's group `resumed` is
#: those less the reading of the clock, `chunk` the reading when it entered. entered: at place i the slot of the
#: i-th that left a queue in this decision.
SLOT = _record_type(
    "request decodes origin key resumed target done chunk older newer earlier later partial segment entered",
    "stalled",
)

#: Decodes that run together: clock, number, KV tokens and units they hold; the stack of their preempted
#: requests; when they were last served, which is when those not stalled emitted their last token; `wait`:
#: whether the block serves them. entered (`nested-wait`): how many joined in this decision and are still there.
GROUP = _record_type("clock decodes held units top depth chosen entered", "last")

#: `nested-wait`: threshold and number of positions of a segment, and the queue at its first one: oldest
#: and newest slot, number, KV tokens and units they hold. The first segment's queue is the row's.
SEGMENT = _record_type("threshold positions head tail queued held units")

#: A preempted request: the next one on its stack, output tokens kept, since when it waits, when last served
#: (if it keeps tokens, with the last of them); the last also of those that stand still before a segment.
#: stored: its KV tokens in the host's memory. turned: the decision by which they move, if they do.
RETURNED = _record_type("below produced stored", "since served turned")

#: Everything else. now: the next decision instant; until: no decision is taken at or after it (at most the
#: horizon); left: iterations left of a block. held_before, residents_before: KV tokens and residents during
#: the iteration that ended at `now`; queued: KV tokens that those waiting need at admission, counted from
#: where the run began and so right for requests that join through `route` only. leaving: the first deadline not
#: yet kept or known to be void; dropped: KV tokens of those who left unfinished. shared: units that residents hold more
#: than once in their sum, because they use the same block of the prefix cache.
STATE = _record_type(
    "residents vacant oldest newest partials waiting returned arrived reserved since_prefill queue_left"
    " iterations batch_sizes batch_tokens preempted wasted cached swapped stored moved peak_kv samples verdict kv_end"
    " emitted stalls left held_before residents_before entered queued leaving dropped shared",
    "now until gap_s busy kv_area resident_area waiting_area end sample_at sample_step",
)

#: Look-ahead (`shares` > 0) and order by length (`shortest`). limit: of memory forecast, in units / shares;
#: longest: iterations that a forecast reaches at most; origin, leaves: of the trees, which reach from the origin
#: over leaves x block readings of the clock; counted: residents in them; incomplete: forecast of those whose
#: prompt stays incomplete; blocked: iterations for which who was refused is certain to be; witness: see above.
AHEAD = _record_type("shares limit shortest longest origin leaves counted incomplete blocked witness")

#: What is forecast of the resident in a slot: origin and reading at which it had no token, the first of the lengths
#: still possible, when that ends; earlier, later: its day.
FORECAST = _record_type("counted origin birth first date earlier later")

#: A node of a tree: shares of requests that end in it, shares of their bases in units, bound on their memory.
NODE = _record_type("count origin peak")

#: The waiting of a row, a heap of places: where it begins, how many there are.
HEAP = _record_type("start waiting")

#: The prefix cache that fills with the run: tokens and units of a block; of those idle the oldest, the newest and their
#: number; how many requests were admitted.
STORE = _record_type("tokens units oldest newest idle admitted")

#: A block: how many residents use it, whether it is idle, and those idle before and after it.
BLOCK = _record_type("users idle earlier later")

Records = NDArray[np.void]
Pointer = Any  # one record of such an array

FINISHED, AT_HORIZON, STUCK = range(3)

AT_ONCE = -1.0

GAVE_UP, HUNG_UP = 1, 2
_MARKED = -1
UNROUTED = -2


class Calendars(NamedTuple):
    """A calendar of D days per group: heads of the days' lists (G·D,), bits; `phase` counts the decodes by
    base mod block (G, b)."""

    days: int
    heads: Ints
    bits: Ints
    phase: Ints


class Run(NamedTuple):
    """All a loop reads and writes: one record of rules and of state; N requests, J rows, G groups, L segments
    (none but with `nested-wait`), I pieces.

    `arrival`, `prompt`, `output`, `row` (N,) are the path, and `cached` (N,) what the prefix cache has of its
    prompts, (0,) if nothing; `order` sorts it by row, oldest first; `admitted`,
    `first_token`, `finish` (NaN where it did not happen), `preemptions` (N,), `gaps` (B,) and `occupancy`
    (2·points, 4) are what becomes of it. `deadline` (E,) are the deadlines of rule 35 in order, `leaver` (E,) twice
    the request's index, and one more where it is the second; `left` (NaN) and `fate` (0; `GAVE_UP`, `HUNG_UP`)
    (N,) when and how requests left unfinished. All four are empty where nobody has a deadline. `owner` (N,) is the
    replica that each request was routed to, `UNROUTED` before it arrives; (0,) where there is only one.
    """

    rules: Records
    state: Records
    coefficients: Floats
    arrival: Floats
    prompt: Ints
    output: Ints
    cached: Ints
    row: Ints
    order: Ints
    rows: Records
    recent: Ints
    slots: Records
    groups: Records
    segments: Records
    calendars: Calendars
    returned: Records
    admitted: Floats
    first_token: Floats
    finish: Floats
    preemptions: Ints
    gaps: Ints
    occupancy: Floats
    deadline: Floats
    leaver: Ints
    left: Floats
    fate: Ints
    owner: Ints


class Ahead(NamedTuple):
    """What look-ahead and orders by length read and write.

    `believed` (N,) are lengths, or `lengths` (m,), ascending, a law; `place` (N,) is a request's place in the
    order in which it is served within a priority and `requests` the inverse, `heap` (N,) holds places. `days`
    and `bits` are a calendar of the next ends that pass.
    """

    state: Records
    believed: Ints
    lengths: Ints
    forecasts: Records
    days: Ints
    bits: Ints
    tree: Records
    place: Ints
    requests: Ints
    heaps: Records
    heap: Ints


class Store(NamedTuple):
    """The prefix cache that fills with the run, rules 39 to 42.

    The whole blocks of request i are `names[first[i]:first[i + 1]]`, places in `blocks`; `used` says which of them it
    uses in the cache, `entered` (N,) how many of them it has found or computed, `turn` (N,) when it was admitted among
    all; `leavers` holds who leaves in an iteration.
    """

    state: Records
    blocks: Records
    first: Ints
    names: Ints
    used: Ints
    entered: Ints
    turn: Ints
    leavers: Ints


# --------------------------------------------------------------------------- gaps between tokens


@_inline
def _bucket(rules: Pointer, gap: float) -> int:
    """The bucket of `histogram` that a gap of this many seconds lies in."""
    place = (np.float64(gap).view(np.int64) >> rules.gap_shift) - rules.gap_first
    return _at(min(max(place, 0), rules.gap_last))


@_inline
def _edge(rules: Pointer, place: int) -> float:
    """Where this bucket begins, s."""
    return np.int64((place + rules.gap_first) << rules.gap_shift).view(np.float64)


@_inline
def _below(rules: Pointer, place: int, first: float, slope: float, k: int) -> int:
    """How many of k iterations that last first, first + slope, … are shorter than where this bucket begins."""
    quotient = (_edge(rules, place) - first) / max(slope, TINY)
    return math.ceil(min(quotient, float(k)))


@_inline
def _spread_gaps(rules: Pointer, gaps: Ints, first: float, last: float, slope: float, n: int, k: int) -> None:
    """Count n gaps for each of k iterations that last first, first + slope, … last.

    How many buckets a run crosses no processor foresees, so up to two are counted without asking.
    """
    place, end = _bucket(rules, first), _bucket(rules, last)
    if end > place + 2 or place + 2 > rules.gap_last:
        counted = 0
        for j in range(place, end):
            below = _below(rules, j + 1, first, slope, k)
            gaps[j] += n * (below - counted)
            counted = below
        gaps[end] += n * (k - counted)
    else:
        below = _below(rules, place + 1, first, slope, k)
        counted = _below(rules, place + 2, first, slope, k)
        gaps[place] += n * below
        gaps[place + 1] += n * (counted - below)
        gaps[place + 2] += n * (k - counted)


@_part
def _spread_gaps_bent(gaps: Ints, coef: Floats, limits: Records, n: int, m: int, k: int) -> None:
    """Count n gaps for each of k iterations of which the first reads m tokens, stretch by stretch."""
    r = _int(0)
    while r < k:
        value, slope, stop = _stretch(coef, n, m, r, k)
        _spread_gaps(limits[0], gaps, value, value + slope * (stop - r - 1), slope, n, stop - r)
        r = stop


@_inline
def _count_gaps(
    run: Run, n: int, m: int, k: int, first: float, last: float, slope: float, duration: float
) -> None:
    """Count the gaps of n decodes in k iterations, `duration` in all; several decode only and first read m."""
    if k == 1:
        run.gaps[_bucket(run.rules[0], first)] += n
    elif slope == BENT:
        _spread_gaps_bent(run.gaps, run.coefficients, run.rules, n, m, k)
    else:
        _spread_gaps(run.rules[0], run.gaps, first, last, slope, n, k)
    run.state[0].gap_s += n * duration


@_inline
def _count_gap(run: Run, gap: float) -> None:
    """Count one gap of so many seconds."""
    run.gaps[_bucket(run.rules[0], gap)] += 1
    run.state[0].gap_s += gap


@_inline
def _lengthen_gaps(s: Pointer, rules: Pointer, gaps: Ints, n: int, first: float, missed: float) -> None:
    """Of the gaps counted as `first`, n lasted `missed` seconds more."""
    gaps[_bucket(rules, first)] -= n
    gaps[_bucket(rules, first + missed)] += n
    s.gap_s += n * missed


@_part
def _end_stalls(
    s: Pointer, rules: Pointer, slots: Records, gaps: Ints, first: float, now: float, counted: bool
) -> None:
    """Stalled decodes that run in the iteration from now on, of `first` seconds, emit at last."""
    slot = s.oldest
    while slot != NOBODY:
        if slots[slot].decodes == 1 and slots[slot].stalled != AT_ONCE:
            if counted:
                _lengthen_gaps(s, rules, gaps, 1, first, now - slots[slot].stalled)
            slots[slot].stalled = AT_ONCE
            s.stalls -= 1
        slot = slots[slot].newer


# --------------------------------------------------------------------------- residents


@_inline
def _enter(s: Pointer, slots: Records, request: int) -> int:
    """Give `request` a vacant slot, as the most recently admitted resident."""
    slot = _at(s.vacant)
    s.vacant = slots[slot].newer
    slots[slot].request = request
    slots[slot].stalled = AT_ONCE
    slots[slot].older = s.newest
    slots[slot].newer = NOBODY
    if s.newest == NOBODY:
        s.oldest = slot
    else:
        slots[_at(s.newest)].newer = slot
    s.newest = slot
    s.residents += 1
    return slot


@_inline
def _leave(s: Pointer, slots: Records, slot: int) -> None:
    """Vacate `slot`."""
    older, newer = slots[slot].older, slots[slot].newer
    if older == NOBODY:
        s.oldest = newer
    else:
        slots[_at(older)].newer = newer
    if newer == NOBODY:
        s.newest = older
    else:
        slots[_at(newer)].older = older
    slots[slot].newer = s.vacant
    s.vacant = slot
    s.residents -= 1


@_inline
def _units(rules: Pointer, tokens: int) -> int:
    """Memory that this many KV tokens of one request take."""
    if rules.block == 1:
        return tokens
    return (tokens + rules.block - 1) // rules.block


@_inline
def _cached(run: Run, request: int) -> int:
    """Rule 4: prompt tokens of the request that the prefix cache has."""
    return run.cached[request] if run.cached.size > 0 else 0


@_inline
def _finish(run: Run, slot: int, now: float) -> None:
    """The last iteration of the resident in `slot`, which does not decode any more, ended now."""
    s, rules, slots = run.state[0], run.rules[0], run.slots
    request = _at(slots[slot].request)
    run.finish[request] = now
    if rules.reserve > 0:
        s.reserved -= _units(rules, run.prompt[request] + rules.reserve - 1)
    _leave(s, slots, slot)


@_inline
def _start_decode(
    slots: Records, groups: Records, calendars: Calendars, group: int, slot: int, held: int, to_go: int
) -> None:
    """Let the resident that holds `held` tokens decode in its group, to finish in `to_go` ticks."""
    clock = groups[group].clock
    base = held - clock
    key = clock + to_go
    slots[slot].decodes = 1
    slots[slot].origin = base
    slots[slot].key = key
    block = calendars.phase.shape[1]
    groups[group].decodes += 1
    groups[group].held += held
    if block > 1:
        groups[group].units += (held + block - 1) // block
        calendars.phase[group, base % block] += 1
    calendar_add(calendars.heads, calendars.bits, slots, calendars.days, group, key, slot)


@_inline
def _stop_decode(slots: Records, groups: Records, calendars: Calendars, group: int, slot: int) -> int:
    """Take the resident out of its group's decodes; return the KV tokens it holds."""
    base = slots[slot].origin
    held = base + groups[group].clock
    block = calendars.phase.shape[1]
    slots[slot].decodes = 0
    groups[group].decodes -= 1
    groups[group].held -= held
    if block > 1:
        groups[group].units -= (held + block - 1) // block
        calendars.phase[group, base % block] -= 1
    calendar_remove(calendars.heads, calendars.bits, slots, calendars.days, group, slots[slot].key, slot)
    return held


@_inline
def _units_held(groups: Records, calendars: Calendars, group: int) -> int:
    """Memory the group's decodes hold, units."""
    if calendars.phase.shape[1] == 1:
        return groups[group].held
    return groups[group].units


@_part
def _growth(groups: Records, calendars: Calendars, group: int, ticks: int) -> int:
    """Units of memory that the group's decodes take within the next `ticks` ticks."""
    decodes = groups[group].decodes
    block = calendars.phase.shape[1]
    if block == 1:
        return decodes * ticks
    grown = decodes * (ticks // block)
    clock = groups[group].clock
    for r in range(ticks % block):
        grown += calendars.phase[group, (-clock - r) % block]
    return grown


@_inline
def _tick(groups: Records, calendars: Calendars, group: int, ticks: int) -> None:
    """Let the group's decodes run `ticks` iterations."""
    if calendars.phase.shape[1] > 1:
        groups[group].units += _growth(groups, calendars, group, ticks)
    groups[group].held += groups[group].decodes * ticks
    groups[group].clock += ticks


@_inline
def _to_completion(groups: Records, calendars: Calendars, group: int) -> int:
    """Ticks to the next day of the group's calendar with anybody on it; the group has decodes."""
    return calendar_next(calendars.bits, calendars.days, group, groups[group].clock)


@_inline
def _complete(run: Run, group: int, now: float) -> None:
    """Let those decodes of the group leave whose last iteration ended now."""
    slots, groups, calendars = run.slots, run.groups, run.calendars
    clock = groups[group].clock
    slot = calendars.heads[_at(group * calendars.days + (clock & (calendars.days - 1)))]
    while slot != NOBODY:
        slot = _at(slot)
        following = slots[slot].later
        if slots[slot].key == clock:
            _stop_decode(slots, groups, calendars, group, slot)
            _finish(run, slot, now)
        slot = following


@_inline
def _emit(run: Run, group: int, slot: int, now: float) -> None:
    """The prefill of `slot` is complete: it emits a token, then decodes or, if that was its last, leaves."""
    slots, groups, calendars = run.slots, run.groups, run.calendars
    request = _at(slots[slot].request)
    resumed = slots[slot].resumed
    if resumed == 0:
        run.first_token[request] = now
    elif now > run.rules[0].warmup:
        _count_gap(run, now - run.returned[request].served)
    to_go = run.output[request] - resumed - 1
    if to_go == 0:
        _finish(run, slot, now)
    else:
        _start_decode(slots, groups, calendars, group, slot, slots[slot].target, to_go)


# --------------------------------------------------------------------------- the prefix cache that fills with the run


@_part
def _find(run: Run, store: Store, request: int, produced: int) -> tuple[int, int]:
    """Rule 40: tokens that the request finds, and the units of them that others use."""
    c, blocks = store.state[0], store.blocks
    first = store.first[request]
    most = min((run.prompt[request] + produced - 1) // c.tokens, store.first[request + 1] - first)
    count = in_use = 0
    while count < most:
        block = store.names[first + count]
        if blocks[block].users == 0 and blocks[block].idle == 0:
            break
        in_use += blocks[block].users > 0
        count += 1
    return c.tokens * count, c.units * in_use


@_part
def _take(run: Run, store: Store, request: int, found: int) -> None:
    """The request, just admitted, uses the blocks of the tokens that it found."""
    s, c, blocks = run.state[0], store.state[0], store.blocks
    first = store.first[request]
    count = found // c.tokens
    for place in range(first, first + count):
        block = store.names[place]
        if blocks[block].users > 0:
            s.shared += c.units
        else:
            _wake(c, blocks, block)
        blocks[block].users += 1
        store.used[place] = 1
    store.entered[request] = count
    c.admitted += 1
    store.turn[request] = c.admitted


@_part
def _wake(c: Pointer, blocks: Records, block: int) -> None:
    """Take a block from the list of those that are idle."""
    before, after = blocks[block].earlier, blocks[block].later
    if before == NOBODY:
        c.oldest = after
    else:
        blocks[before].later = after
    if after == NOBODY:
        c.newest = before
    else:
        blocks[after].earlier = before
    blocks[block].idle = 0
    c.idle -= 1


@_part
def _release(run: Run, store: Store, request: int) -> None:
    """Rule 42: the request uses its blocks no more, the last first."""
    s, c, blocks = run.state[0], store.state[0], store.blocks
    first = store.first[request]
    for i in range(store.entered[request]):
        place = first + store.entered[request] - 1 - i
        if store.used[place] == 0:
            continue
        store.used[place] = 0
        block = store.names[place]
        blocks[block].users -= 1
        if blocks[block].users > 0:
            s.shared -= c.units
            continue
        blocks[block].idle = 1
        blocks[block].earlier = c.newest
        blocks[block].later = NOBODY
        if c.newest == NOBODY:
            c.oldest = block
        else:
            blocks[c.newest].later = block
        c.newest = block
        c.idle += 1


@_part
def _make_room(run: Run, store: Store, used: int) -> None:
    """Drop the blocks idle longest until those left fit beside `used` units, shared ones counted for every resident."""
    c = store.state[0]
    while c.idle > 0 and used + c.units * c.idle > run.rules[0].capacity + run.state[0].shared:
        _wake(c, store.blocks, c.oldest)


@_part
def _enter_blocks(run: Run, store: Store, request: int, computed: int) -> None:
    """Rule 41 for a request of whose prompt so many tokens are computed."""
    blocks = store.blocks
    first = store.first[request]
    whole = min(computed // store.state[0].tokens, store.first[request + 1] - first)
    for place in range(first + store.entered[request], first + whole):
        block = store.names[place]
        if blocks[block].users == 0 and blocks[block].idle == 0:
            blocks[block].users = 1
            store.used[place] = 1
    store.entered[request] = max(store.entered[request], whole)


@_part
def _end_iteration(run: Run, store: Store) -> None:
    """Rules 41 and 42 at the end of an iteration, whose clock has ticked; requests leave in the order of the batch."""
    s, slots, calendars = run.state[0], run.slots, run.calendars
    count = 0
    for i in range(s.partials):
        slot = slots[i].partial
        request, computed = slots[slot].request, slots[slot].done + slots[slot].chunk
        _enter_blocks(run, store, request, computed)
        if computed == slots[slot].target and run.output[request] == slots[slot].resumed + 1:
            count = _will_leave(run, store, request, count, run.rules[0].decodes_first == 1)
    clock = run.groups[0].clock
    slot = calendars.heads[clock & (calendars.days - 1)]
    while slot != NOBODY:
        if slots[slot].key == clock:
            count = _will_leave(run, store, slots[slot].request, count, False)
        slot = slots[slot].later
    for i in range(count):
        _release(run, store, store.leavers[i])


@_part
def _will_leave(run: Run, store: Store, request: int, count: int, last: bool) -> int:
    """Put a request in its place among `count` that leave: by admission, those that are last after all others."""
    if last:
        store.turn[request] += FAR
    place = count
    while place > 0 and store.turn[store.leavers[place - 1]] > store.turn[request]:
        store.leavers[place] = store.leavers[place - 1]
        place -= 1
    store.leavers[place] = request
    return count + 1


# --------------------------------------------------------------------------- the queue


@_inline
def _join(run: Run, now: float) -> None:
    """Rule 1: arrivals up to and at the instant have joined."""
    s, rows = run.state[0], run.rows
    arrived = _at(s.arrived)
    while arrived < run.arrival.size and run.arrival[arrived] <= now:
        rows[_at(run.row[arrived])].tail += 1
        arrived += 1
    s.waiting += arrived - s.arrived
    s.arrived = arrived


@_inline
def _newcomers(rows: Records, row: int) -> int:
    """How many of the row wait that were never admitted."""
    waiting: int = rows[row].tail - rows[row].head - rows[row].gone
    return waiting


@_part
def _pass_over_gone(rows: Records, order: Ints, fate: Ints, row: int) -> None:
    """Let the row's queue begin with one that is there; one by length is left to `_pass_over_shortest`."""
    while rows[row].head < rows[row].tail and fate[order[rows[row].head]] != 0:
        rows[row].head += 1
        rows[row].gone -= 1


@_part
def _preempt(run: Run, store: Store | None, group: int, now: float) -> None:
    """Rule 8: the newest resident, of this group, loses its place and waits on the group's stack."""
    s, slots = run.state[0], run.slots
    groups, returned, calendars = run.groups, run.returned, run.calendars
    slot = s.newest
    request = slots[slot].request
    produced = slots[slot].resumed
    held = slots[slot].done
    served = groups[group].last
    if slots[slot].decodes == 1:
        produced = run.output[request] - (slots[slot].key - groups[group].clock)
        held = _stop_decode(slots, groups, calendars, group, slot)
        if slots[slot].stalled != AT_ONCE:
            served = slots[slot].stalled
            s.stalls -= 1
    else:
        s.partials -= 1  # prefilling slots are listed in the order of admission: it is the last
        served = returned[request].served if run.preemptions[request] > 0 else run.arrival[request]
    _return(run, group, slot, produced, held, served, now)
    if store is not None:
        _release(run, store, request)


@_inline
def _return(run: Run, stack: int, slot: int, produced: int, held: int, served: float, now: float) -> None:
    """The resident in `slot` loses its place, and the KV tokens it holds, and waits on top of `stack`."""
    s, rules, slots = run.state[0], run.rules[0], run.slots
    groups, returned = run.groups, run.returned
    request = slots[slot].request
    _leave(s, slots, slot)
    if rules.restart:
        produced = 0
        run.first_token[request] = math.nan
    if rules.swap:
        returned[request].stored = held
        s.stored += held
        s.swapped += max(_move(run, request, held, now), 0)
    else:
        cached = _cached(run, request)
        s.wasted += held - cached
        s.cached -= cached
    if rules.reserve > 0:
        s.reserved -= _units(rules, run.prompt[request] + rules.reserve - 1)
    s.queued += run.prompt[request] + produced
    s.preempted += 1
    s.returned += 1
    run.preemptions[request] += 1
    returned[request].produced = produced
    returned[request].since = now
    returned[request].served = served
    returned[request].below = groups[stack].top
    groups[stack].top = request
    groups[stack].depth += 1


@_inline
def _move(run: Run, request: int, tokens: int, now: float) -> int:
    """Rule 9a: tokens move, or those that were to move in this decision do not; what that adds."""
    if run.returned[request].turned == now:
        run.returned[request].turned = AT_ONCE
        tokens = -tokens
    else:
        run.returned[request].turned = now
    run.state[0].moved += tokens
    return tokens


@_inline
def _admit(run: Run, stack: int, row: int, now: float) -> int:
    """Admit the request on top of `stack`, or if that is empty the oldest newcomer of `row`."""
    s, rules, slots = run.state[0], run.rules[0], run.slots
    groups, rows, returned = run.groups, run.rows, run.returned
    request = groups[stack].top
    if request != NOBODY:
        groups[stack].top = returned[request].below
        groups[stack].depth -= 1
        s.returned -= 1
        since = returned[request].since
        produced = returned[request].produced
    else:
        request = run.order[_at(rows[row].head)]
        rows[row].head += 1
        s.waiting -= 1
        request = _at(request)
        since = run.arrival[request]
        produced = rules.handed
        run.admitted[request] = now
        if rows[row].gone > 0 and not rules.by_length:
            _pass_over_gone(rows, run.order, run.fate, row)
    request = _at(request)
    waited = now - max(since, rules.warmup)
    if waited > 0.0:
        s.waiting_area += waited
    slot = _enter(s, slots, request)
    slots[slot].resumed = produced
    slots[slot].target = run.prompt[request] + produced
    s.queued -= run.prompt[request] + produced
    slots[slot].done = _cached(run, request)
    s.cached += slots[slot].done
    slots[slot].decodes = 0
    slots[_at(s.partials)].partial = slot
    s.partials += 1
    return slot


@_part
def _next_hold(rows: Records, order: Ints, arrival: Floats, fate: Ints, row: int, now: float) -> float:
    """Smallest arrival + hold of the row's newcomers that is later than now."""
    low, high = rows[row].head, rows[row].tail
    while low < high:
        middle = (low + high) // 2
        if arrival[order[middle]] + rows[row].hold > now:
            high = middle
        else:
            low = middle + 1
    if rows[row].gone > 0:
        while low < rows[row].tail and fate[order[low]] != 0:
            low += 1
    if low == rows[row].tail:
        return math.inf
    return arrival[order[low]] + rows[row].hold


# --------------------------------------------------------------------------- leaving before the end


@_part
def _next_deadline(run: Run) -> float:
    """Rule 35: the first deadline to come that still holds, s; infinite if there is none.

    One of a request that has not been routed yet may hold: it is not before that request's arrival.
    """
    s = run.state[0]
    while s.leaving < run.deadline.size:
        request = run.leaver[s.leaving] >> 1
        always = run.leaver[s.leaving] & 1
        here = run.fate[request] == 0 and math.isnan(run.finish[request])
        if run.owner.size > 0:
            if run.owner[request] == UNROUTED:
                return run.deadline[s.leaving]
            here = here and run.owner[request] == run.rules[0].replica
        if here and (always == 1 or math.isnan(run.admitted[request])):
            return run.deadline[s.leaving]
        s.leaving += 1
    return math.inf


@_part
def _drop(run: Run, slot: int) -> None:
    """A resident leaves unfinished."""
    s, rules, slots, groups = run.state[0], run.rules[0], run.slots, run.groups
    request = slots[slot].request
    if slots[slot].decodes == 1:
        group = slots[slot].segment if run.segments.size > 0 else _stack(run, request)
        held = _stop_decode(slots, groups, run.calendars, group, slot)
        if slots[slot].stalled != AT_ONCE:
            s.stalls -= 1
    elif slots[slot].decodes == _QUEUED:
        held = _dequeue(run, slot)
    else:
        held = slots[slot].done
        place = 0
        while slots[place].partial != slot:
            place += 1
        s.partials -= 1
        for i in range(place, s.partials):
            slots[i].partial = slots[i + 1].partial
    if rules.reserve > 0:
        s.reserved -= _units(rules, run.prompt[request] + rules.reserve - 1)
    _leave(s, slots, slot)
    cached = _cached(run, request)
    s.dropped += held - cached
    s.cached -= cached


@_inline
def _stack(run: Run, request: int) -> int:
    """The stack that the request waits on when it is preempted: its row's under `wait`, else the only one."""
    if run.groups.size == 1 or run.segments.size > 0:
        return 0
    row: int = run.row[request]
    return row


@_part
def _leave_stack(run: Run, request: int) -> None:
    """A preempted request leaves unfinished."""
    s, groups, returned = run.state[0], run.groups, run.returned
    stack = _stack(run, request)
    above = groups[stack].top
    if above == request:
        groups[stack].top = returned[request].below
    else:
        while returned[above].below != request:
            above = returned[above].below
        returned[above].below = returned[request].below
    groups[stack].depth -= 1
    s.returned -= 1
    stored = returned[request].stored
    if stored > 0:
        cached = _cached(run, request)
        s.stored -= stored
        s.dropped += stored - cached
        s.cached -= cached


# --------------------------------------------------------------------------- time and measures


@_part
def _sample(s: Pointer, occupancy: Floats, held: int, now: float) -> None:
    """Rule 25: a row of the occupancy series at the first decision at or after each point of the grid."""
    count = s.samples
    occupancy[count, 0] = now
    occupancy[count, 1] = held
    occupancy[count, 2] = s.residents
    occupancy[count, 3] = s.waiting + s.returned
    count += 1
    if count == occupancy.shape[0]:
        count //= 2
        for i in range(count):
            for column in range(4):
                occupancy[i, column] = occupancy[2 * i, column]
        s.sample_step *= 2.0
    s.samples = count
    s.sample_at = (now // s.sample_step + 1.0) * s.sample_step


@_inline
def _run_length(
    run: Run, n: int, m: int, held: int, now: float, wake: float, k: int
) -> tuple[int, float, float, float, float, float]:
    """Iterations (at most k) to run before the next decision, and what `decode_run` says of them.

    They end at the first end at or after `wake`; an iteration that straddles the end of the warm-up or the
    horizon is left to be run alone.
    """
    rules, coef = run.rules[0], run.coefficients
    wake = min(wake, run.state[0].until)
    if now < rules.warmup:
        wake = min(wake, rules.warmup)
    while True:
        k, duration, area, first, last, slope = decode_run(coef, n, m, held, now, wake, k)
        end = now + duration
        if k == 1 or not (end > rules.horizon or now < rules.warmup < end):
            return k, duration, area, first, last, slope
        wake = math.inf
        k -= 1


@_inline
def _account(
    run: Run,
    now: float,
    duration: float,
    area: float,
    held: int,
    size: int,
    tokens: int,
    emitted: int,
    k: int,
) -> bool:
    """Count k iterations of `size` requests, `tokens` tokens and `emitted` output tokens each.

    False if the horizon cut the (only) iteration. `held` tokens of KV are held in the last of them, `area` is
    the integral over all.
    """
    s, rules = run.state[0], run.rules[0]
    end = now + duration
    if now >= rules.warmup and end <= rules.horizon:
        s.busy += duration
        s.kv_area += area
        s.resident_area += duration * s.residents
    elif end > rules.warmup:
        inside = min(end, rules.horizon) - max(now, rules.warmup)
        if inside > 0.0:
            s.busy += inside
            s.kv_area += inside * held
            s.resident_area += inside * s.residents
    if end > rules.horizon:
        return False
    s.iterations += k
    s.batch_sizes += size * k
    s.batch_tokens += tokens * k
    s.peak_kv = max(s.peak_kv, held)
    if end > rules.warmup:
        s.emitted += emitted * k
    return True


@_part
def _close(
    s: Pointer, warmup: float, groups: Records, returned: Records, now: float, held: int, verdict: int
) -> None:
    """End the run now: verdict, KV, and the waiting of the preempted who still wait."""
    s.verdict = verdict
    s.kv_end = held
    s.end = s.now = now
    for stack in range(groups.size):
        request = groups[stack].top
        while request != NOBODY:
            s.waiting_area += max(0.0, now - max(returned[request].since, warmup))
            request = returned[request].below


# --------------------------------------------------------------------------- looking ahead


@_part
def _plant(tree: Records, at: int, leaves: int, leaf: int, count: int, base: int, following: int) -> None:
    """Add to a leaf of the tree that begins at `at`, and bring up to date what is above it.

    Nodes above the leaf `following` (`NOBODY`: none), too, are left to it: it is the next to be added to.
    """
    i = leaves + leaf
    node = at + i
    tree[node].count += count
    tree[node].origin += base
    tree[node].peak = tree[node].origin + tree[node].count * leaf
    width = 1
    level = 1
    while i > 1:
        if following != NOBODY and (leaves + following) >> level == i >> 1:
            return
        i >>= 1
        left = at + 2 * i
        last = 2 * i * width + width - 1 - leaves
        right_count, right_base = tree[left + 1].count, tree[left + 1].origin
        peak = tree[left].peak
        if right_count > 0:
            peak += right_count * last + right_base
            if tree[left].count == 0 or tree[left + 1].peak > peak:
                peak = tree[left + 1].peak
        node = at + i
        tree[node].count = tree[left].count + right_count
        tree[node].origin = tree[left].origin + right_base
        tree[node].peak = peak
        width *= 2
        level += 1


@_part
def _first_excess(ahead: Ahead, block: int, clock: int, limit: int) -> tuple[int, int]:
    """A reading of at least clock + 2 for which more than `limit` is forecast, and how much; else `NOBODY`."""
    a, tree = ahead.state[0], ahead.tree
    leaves = a.leaves
    for rest in range(block):
        at = rest * 2 * leaves
        first = (clock + 1 - a.origin - rest + block) // block
        i, width = 1, leaves
        count = base = 0
        while True:
            node = at + i
            last = i * width + width - 1 - leaves
            if last < first:
                break
            if tree[node].count > 0:
                peak = tree[node].peak + count * last + base
                if peak > limit:
                    if width == 1:
                        return a.origin + block * last + rest, peak
                    width >>= 1
                    i = 2 * i + 1
                    continue
                count += tree[node].count
                base += tree[node].origin
            while i & 1 == 0:
                i >>= 1
                width <<= 1
            if i == 1:
                break
            i -= 1
    return NOBODY, 0


@_part
def _forecast_at(ahead: Ahead, block: int, reading: int) -> int:
    """Memory forecast for this reading of the clock, in units / shares."""
    a, tree = ahead.state[0], ahead.tree
    leaf, rest = (reading - a.origin) // block, (reading - a.origin) % block
    at = rest * 2 * a.leaves
    i = a.leaves + leaf
    count, base = tree[at + i].count, tree[at + i].origin
    while i > 1:
        if i & 1 == 0:
            count += tree[at + i + 1].count
            base += tree[at + i + 1].origin
        i >>= 1
    return base + count * leaf


@_inline
def _forecast_end(run: Run, ahead: Ahead, request: int, base: int, birth: int, j: int) -> int:
    """The reading at which it finishes if the j-th length is true.

    A belief is cut where the request alone holds more than the limit: then rule 14 refuses everybody.
    """
    if ahead.lengths.size > 0:
        return birth + ahead.lengths[j]
    return min(birth + ahead.believed[request], ahead.state[0].limit * run.rules[0].block + 1 - base)


@_inline
def _first_length(run: Run, ahead: Ahead, request: int, base: int, birth: int) -> int:
    """The first of the lengths that may still be true; their number if none may."""
    clock = run.groups[0].clock
    count = max(ahead.lengths.size, 1)
    first = 0
    while first < count and _forecast_end(run, ahead, request, base, birth, first) <= clock:
        first += 1
    return first


@_part
def _spread(run: Run, ahead: Ahead, request: int, base: int, birth: int, first: int, weight: int) -> None:
    """Put so many shares of each length of a request, from the first possible on, into the trees.

    What ends now or has ended is not looked at any more, and stays.
    """
    a = ahead.state[0]
    block = run.rules[0].block
    clock = run.groups[0].clock
    count = max(ahead.lengths.size, 1)
    while first < count and _forecast_end(run, ahead, request, base, birth, first) <= clock:
        first += 1
    if first == count:
        return
    for rest in range(block):
        units = (base + a.origin + rest + block - 1) // block
        end = _forecast_end(run, ahead, request, base, birth, first)
        leaf = (end - a.origin - rest) // block
        for j in range(first, count):
            following = NOBODY
            if j + 1 < count:
                end = _forecast_end(run, ahead, request, base, birth, j + 1)
                following = (end - a.origin - rest) // block
            if leaf >= 0:
                _plant(ahead.tree, rest * 2 * a.leaves, a.leaves, leaf, weight, weight * units, following)
            leaf = following


@_inline
def _weight(ahead: Ahead, first: int) -> int:
    """The shares of each length of a request of which those from `first` on may be true."""
    return ahead.state[0].shares // max(ahead.lengths.size - first, 1)


@_part
def _own_forecast(
    run: Run, ahead: Ahead, request: int, base: int, birth: int, first: int, reading: int
) -> tuple[int, int]:
    """What a request adds to the forecast for a reading: its shares and its memory."""
    count = max(ahead.lengths.size, 1)
    shares = 0
    for j in range(first, count):
        shares += _forecast_end(run, ahead, request, base, birth, j) >= reading
    if shares == 0:
        return 0, 0
    shares *= _weight(ahead, first)
    return shares, shares * _units(run.rules[0], base + reading)


@_part
def _incomplete_forecast(run: Run, ahead: Ahead, request: int, produced: int, target: int) -> int:
    """Rule 33 for a request whose prompt stays incomplete, in units / shares."""
    rules, shares = run.rules[0], ahead.state[0].shares
    count = ahead.lengths.size
    if count == 0:
        return shares * _units(rules, target + max(ahead.believed[request] - produced - 1, 0))
    first = 0
    while first < count and ahead.lengths[first] <= produced:
        first += 1
    if first == count:
        return shares * _units(rules, target)
    total = 0
    for j in range(first, count):
        total += _units(rules, target + ahead.lengths[j] - produced - 1)
    return total * _weight(ahead, first)


@_part
def _foresee(run: Run, ahead: Ahead, request: int, produced: int, target: int, after: int) -> bool:
    """Rule 32: whether the request, which would hold `after` tokens after this iteration, fits what is ahead.

    If so and its prompt is then complete, its forecast is in the trees.
    """
    a, rules = ahead.state[0], run.rules[0]
    if a.shares == 0:
        return True
    clock = run.groups[0].clock
    somebody = run.state[0].residents > 0
    limit = a.limit * a.shares - a.incomplete
    base, birth = target - clock - 1, clock - produced
    first = max(ahead.lengths.size, 1)
    if after < target:
        if not somebody:
            return True
        limit -= _incomplete_forecast(run, ahead, request, produced, target)
    else:
        first = _first_length(run, ahead, request, base, birth)
        known = somebody and first == 0 and ahead.lengths.size == 0
        if known and _forecast_end(run, ahead, request, base, birth, 0) < birth + ahead.believed[request]:
            return False  # even alone it is believed to exceed the limit
    if somebody and limit < 0:
        return False
    shares = memory = 0
    if somebody and a.witness > clock + 1:
        shares, memory = _own_forecast(run, ahead, request, base, birth, first, a.witness)
        memory += _forecast_at(ahead, rules.block, a.witness)
    if memory <= limit or not somebody:
        _spread(run, ahead, request, base, birth, first, _weight(ahead, first))
        if not somebody:
            return True
        witness, memory = _first_excess(ahead, rules.block, clock, limit)
        if witness == NOBODY:
            return True
        _spread(run, ahead, request, base, birth, first, -_weight(ahead, first))
        shares, _ = _own_forecast(run, ahead, request, base, birth, first, witness)
        a.witness = witness
    a.blocked = a.witness - clock - 1
    if shares > 0:
        a.blocked = min(a.blocked, (memory - limit + shares - 1) // shares)
    return False


@_inline
def _note(run: Run, ahead: Ahead, slot: int, base: int, birth: int, first: int) -> None:
    """Remember the forecast of the resident in `slot`, which is in the trees."""
    forecasts = ahead.forecasts
    forecasts[slot].counted = 0
    if first == max(ahead.lengths.size, 1):
        return
    date = _forecast_end(run, ahead, run.slots[slot].request, base, birth, first)
    forecasts[slot].counted = 1
    forecasts[slot].origin = base
    forecasts[slot].birth = birth
    forecasts[slot].first = first
    forecasts[slot].date = date
    ahead.state[0].counted += 1
    calendar_add(ahead.days, ahead.bits, forecasts, ahead.days.size, 0, date, slot)


@_part
def _forecast(run: Run, ahead: Ahead, slot: int, base: int, birth: int) -> None:
    """Put the forecast of the resident in `slot` into the trees."""
    request = run.slots[slot].request
    first = _first_length(run, ahead, request, base, birth)
    _spread(run, ahead, request, base, birth, first, _weight(ahead, first))
    _note(run, ahead, slot, base, birth, first)


@_part
def _forget(run: Run, ahead: Ahead, slot: int) -> None:
    """Take the forecast of the resident in `slot`, or last there, out of the trees."""
    forecasts = ahead.forecasts
    if forecasts[slot].counted == 1:
        forecasts[slot].counted = 0
        ahead.state[0].counted -= 1
        calendar_remove(ahead.days, ahead.bits, forecasts, ahead.days.size, 0, forecasts[slot].date, slot)
        request = run.slots[slot].request
        base, birth, first = forecasts[slot].origin, forecasts[slot].birth, forecasts[slot].first
        _spread(run, ahead, request, base, birth, first, -_weight(ahead, first))


@_part
def _outlive(run: Run, ahead: Ahead, slot: int) -> None:
    """The resident in `slot` has as many tokens as the length believed, or the first of them: more weighs the rest."""
    forecasts = ahead.forecasts
    request = run.slots[slot].request
    base, birth, before = forecasts[slot].origin, forecasts[slot].birth, forecasts[slot].first
    calendar_remove(ahead.days, ahead.bits, forecasts, ahead.days.size, 0, forecasts[slot].date, slot)
    ahead.state[0].counted -= 1
    first = _first_length(run, ahead, request, base, birth)
    if first < ahead.lengths.size:
        _spread(run, ahead, request, base, birth, first, _weight(ahead, first) - _weight(ahead, before))
    _note(run, ahead, slot, base, birth, first)


@_part
def _forget_gone(run: Run, ahead: Ahead, count: int) -> None:
    """Forget the `count` residents who left last."""
    slot = run.state[0].vacant
    for _ in range(count):
        _forget(run, ahead, slot)
        slot = run.slots[slot].newer


@_part
def _look_ahead(run: Run, ahead: Ahead, preempted: int) -> None:
    """Before anybody is admitted: forget who was preempted, forecast prompts that this iteration completes."""
    a, s, slots = ahead.state[0], run.state[0], run.slots
    if a.shares == 0:
        return
    _forget_gone(run, ahead, preempted)
    clock = run.groups[0].clock
    for i in range(s.partials):
        slot = slots[i].partial
        target, produced = slots[slot].target, slots[slot].resumed
        if slots[slot].done + slots[slot].chunk == target:
            _forecast(run, ahead, slot, target - clock - 1, clock - produced)
        else:
            a.incomplete += _incomplete_forecast(run, ahead, slots[slot].request, produced, target)


@_part
def _enter_ahead(run: Run, ahead: Ahead, slot: int, row: int, produced: int, target: int, after: int) -> None:
    """The resident in `slot` was just admitted, out of `row` (`NOBODY`: preempted before); see `_foresee`."""
    a, slots = ahead.state[0], run.slots
    if a.shortest == 1 and row != NOBODY:
        _take_shortest(run, ahead, row)
        _pass_over_shortest(run, ahead, row)
    if a.shares == 0:
        return
    clock = run.groups[0].clock
    request = slots[slot].request
    if after < target:
        a.incomplete += _incomplete_forecast(run, ahead, request, produced, target)
    else:
        base, birth = target - clock - 1, clock - produced
        _note(run, ahead, slot, base, birth, _first_length(run, ahead, request, base, birth))


@_part
def _pass_ahead(run: Run, ahead: Ahead, gone: int, ticks: int, walked: bool) -> None:
    """The clock went on by `ticks`, `gone` residents left: keep to what is now believed of the others."""
    a, s, slots, forecasts = ahead.state[0], run.state[0], run.slots, ahead.forecasts
    if a.shares == 0:
        return
    _forget_gone(run, ahead, gone)
    if walked:  # those who stood still end later
        slot = s.oldest
        while slot != NOBODY:
            base = slots[slot].origin
            if forecasts[slot].counted == 1 and forecasts[slot].origin != base:
                _forget(run, ahead, slot)
                _forecast(run, ahead, slot, base, slots[slot].key - run.output[slots[slot].request])
            slot = slots[slot].newer
    clock = run.groups[0].clock
    days = ahead.days.size
    day = clock - ticks
    while a.counted > 0:
        day += calendar_next(ahead.bits, days, 0, day)
        if day > clock:
            break
        slot = ahead.days[day & (days - 1)]
        while slot != NOBODY:
            following = forecasts[slot].later
            if forecasts[slot].date <= clock:
                _outlive(run, ahead, slot)
            slot = following
    if clock + a.longest >= a.origin + a.leaves * run.rules[0].block:
        for i in range(ahead.tree.size):
            ahead.tree[i].count = ahead.tree[i].origin = ahead.tree[i].peak = 0
        a.origin = clock
        slot = s.oldest
        while slot != NOBODY:
            if forecasts[slot].counted == 1:
                base, birth, first = forecasts[slot].origin, forecasts[slot].birth, forecasts[slot].first
                _spread(run, ahead, slots[slot].request, base, birth, first, _weight(ahead, first))
            slot = slots[slot].newer


@_part
def _queue_by_length(run: Run, ahead: Ahead, request: int) -> None:
    """Rule 31: who has just joined the queue of its row takes its place in it; the first place is at its head."""
    if ahead.state[0].shortest == 0:
        return
    row = run.row[request]
    heaps, heap = ahead.heaps, ahead.heap
    start, place = heaps[row].start, ahead.place[request]
    i = heaps[row].waiting
    heaps[row].waiting += 1
    while i > 0 and heap[start + (i - 1) // 2] > place:
        heap[start + i] = heap[start + (i - 1) // 2]
        i = (i - 1) // 2
    heap[start + i] = place
    run.order[run.rows[row].head] = ahead.requests[heap[start]]


@_part
def _take_shortest(run: Run, ahead: Ahead, row: int) -> None:
    """Who was at the head of the row's queue is out of it."""
    heaps, heap = ahead.heaps, ahead.heap
    start, size = heaps[row].start, heaps[row].waiting - 1
    heaps[row].waiting = size
    if size == 0:
        return
    place = heap[start + size]
    i = 0
    while True:
        child = 2 * i + 1
        if child + 1 < size and heap[start + child + 1] < heap[start + child]:
            child += 1
        if child >= size or heap[start + child] > place:
            break
        heap[start + i] = heap[start + child]
        i = child
    heap[start + i] = place
    run.order[run.rows[row].head] = ahead.requests[heap[start]]


@_part
def _pass_over_shortest(run: Run, ahead: Ahead, row: int) -> None:
    """Let the row's queue by length begin with one that is there."""
    heaps, heap, rows = ahead.heaps, ahead.heap, run.rows
    if ahead.state[0].shortest == 0:
        return
    while rows[row].gone > 0 and run.fate[ahead.requests[heap[heaps[row].start]]] != 0:
        rows[row].head += 1
        rows[row].gone -= 1
        _take_shortest(run, ahead, row)


@_part
def _depart(run: Run, ahead: Ahead | None, now: float) -> None:
    """Rule 36: keep every deadline up to and at the instant."""
    s, rules, rows, slots = run.state[0], run.rules[0], run.rows, run.slots
    while _next_deadline(run) <= now:
        instant = run.deadline[s.leaving]
        request = run.leaver[s.leaving] >> 1
        if run.owner.size > 0 and run.owner[request] == UNROUTED:
            break
        run.fate[request] = GAVE_UP + (run.leaver[s.leaving] & 1)
        run.left[request] = instant
        s.leaving += 1
        since = run.arrival[request]
        if math.isnan(run.admitted[request]):
            row = run.row[request]
            rows[row].gone += 1
            if not rules.by_length:
                _pass_over_gone(rows, run.order, run.fate, row)
            if ahead is not None:
                _pass_over_shortest(run, ahead, row)
            s.waiting -= 1
            s.queued -= run.prompt[request] + rules.handed
        else:
            slot = s.oldest
            while slot != NOBODY and slots[slot].request != request:
                slot = slots[slot].newer
            if slot != NOBODY:
                run.left[request] = now
                _drop(run, slot)
                if ahead is not None:
                    _forget(run, ahead, slot)
                continue
            since = run.returned[request].since
            s.queued -= run.prompt[request] + run.returned[request].produced
            _leave_stack(run, request)
        s.waiting_area += max(0.0, instant - max(since, rules.warmup))


# --------------------------------------------------------------------------- everybody in service runs


@_part
def _walk(run: Run, store: Store | None, held_back: bool, used: int, now: float) -> tuple[int, int]:
    """Rules 10 and 11 resident by resident, for when budget or memory do not cover all.

    Returns units used and budget left; leaves in `chunk` what each resident gets, decodes included.
    """
    s, rules, slots, groups = run.state[0], run.rules[0], run.slots, run.groups
    slot = s.oldest
    while slot != NOBODY:
        slots[slot].chunk = 0
        slot = slots[slot].newer
    budget = rules.budget
    passes = 2 if rules.decodes_first else 1
    for turn in range(passes):
        slot = s.oldest
        while slot != NOBODY and budget > 0:
            decodes = slots[slot].decodes == 1
            if passes == 2 and decodes != (turn == 0):
                slot = slots[slot].newer
                continue
            if decodes:
                computed = slots[slot].origin + groups[0].clock
                tokens = 1
            elif held_back:
                slot = slots[slot].newer
                continue
            else:
                computed = slots[slot].done
                tokens = min(slots[slot].target - computed, budget, rules.chunk)
            grown = _units(rules, computed + tokens) - _units(rules, computed)
            gone = False
            while used + grown > rules.capacity + s.shared and not gone:
                victim = s.newest
                gone = victim == slot
                held = slots[victim].done
                if slots[victim].decodes == 1:
                    held = slots[victim].origin + groups[0].clock
                used -= _units(rules, held + slots[victim].chunk)
                budget += slots[victim].chunk
                groups[0].last = now
                _preempt(run, store, 0, now)
            if gone:
                break  # it was the newest: nobody is left after it
            slots[slot].chunk = tokens
            used += grown
            if store is not None:
                _make_room(run, store, used)
            budget -= tokens
            slot = slots[slot].newer
    return used, budget


@_inline
def _open_rows(run: Run, now: float) -> None:
    """Rule 17: what each row may admit in this decision."""
    rules, rows = run.rules[0], run.rows
    for j in range(rows.size):
        waiting = _newcomers(rows, j)
        rows[j].quota = 0
        if waiting == 0:
            continue
        if not rules.gated:
            rows[j].quota = FAR
        elif waiting >= rows[j].gate or now >= run.arrival[run.order[rows[j].head]] + rows[j].hold:
            rows[j].quota = rows[j].threshold - _in_window(run, j)


@_inline
def _in_window(run: Run, row: int) -> int:
    """Newcomers that the row admitted within its period, which ends with the iteration now planned."""
    s, rows = run.state[0], run.rows
    size = rows[row].ring
    oldest = s.iterations - rows[row].period
    passed = rows[row].passed
    while passed < rows[row].admissions and run.recent[rows[row].first + passed % size] <= oldest:
        passed += 1
    rows[row].passed = passed
    return rows[row].admissions - passed


_PAUSED = 2

# Why nobody more was admitted.
_NOBODY_MAY, _NO_ROOM_IN_BATCH, _NO_MEMORY = range(3)


@_part
def _bring_back(run: Run, slot: int, stored: int, from_host: bool, group: int, now: float) -> None:
    """Rules 9a and 6a: the KV of the resident just admitted comes from the host, or from another machine."""
    s, slots, returned = run.state[0], run.slots, run.returned
    request = slots[slot].request
    if from_host:
        returned[request].stored = 0
        s.stored -= stored
        s.swapped += min(_move(run, request, stored, now), 0)
    s.cached -= slots[slot].done  # what it holds comes from the host
    produced = slots[slot].resumed
    if produced == 0:
        slots[slot].done = stored
        return
    s.partials -= 1  # it was the last on the list
    if run.segments.size > 0:
        _enter_from_queue(run, 0, slot, produced, stored)
        return
    to_go = run.output[request] - produced
    _start_decode(slots, run.groups, run.calendars, group, slot, stored, to_go)
    slots[slot].stalled = returned[request].served
    s.stalls += 1


def _admission(rare: bool) -> Callable[[Run, Ahead | None, Store | None, int, int, float], int]:
    """The scan of the queue, with or without swapping."""

    @_inline
    def _admit_waiting(
        run: Run, ahead: Ahead | None, store: Store | None, used: int, budget: int, now: float
    ) -> int:
        """Rules 13 to 15, 19 and 32: admit while somebody may enter and fits; return why it ended."""
        s, rules, slots = run.state[0], run.rules[0], run.slots
        groups, rows, returned = run.groups, run.rows, run.returned
        while budget > 0 and s.residents < rules.slots:
            row = NOBODY
            produced = 0
            if s.returned > 0:
                request = groups[0].top
                produced = returned[request].produced
            else:
                request = first = NOBODY
                for j in range(rows.size):
                    if rows[j].quota > 0 and rows[j].head < rows[j].tail:
                        head = place = run.order[_at(rows[j].head)]
                        if ahead is not None:
                            place = ahead.place[head]
                        if row == NOBODY or (rows[j].rank, place) < (rows[row].rank, first):
                            row, request, first = j, head, place
                if row == NOBODY:
                    return _NOBODY_MAY
            request = _at(request)
            target = run.prompt[request] + produced
            holds = _cached(run, request)  # as soon as it enters
            shared = stored = 0
            if store is not None:
                holds, shared = _find(run, store, request, produced)
            if rare:
                if row == NOBODY:
                    stored = returned[request].stored
                elif rules.handed:
                    stored = run.prompt[request]
                    produced = 1
                    target += 1
                if stored > 0:
                    holds = stored
            limit = rules.admission if s.residents > 0 else rules.capacity
            chunk = min(target - holds, budget, rules.chunk)
            if rules.whole_prompts and target - holds > budget:
                return _NO_ROOM_IN_BATCH
            needed = _units(rules, target if rules.whole_prompt else holds + chunk) - shared
            if used + needed > limit + s.shared:
                return _NO_MEMORY
            if rules.reserve > 0:
                reserved = _units(rules, run.prompt[request] + rules.reserve - 1)
                if s.residents > 0 and s.reserved + reserved > limit:
                    return _NO_MEMORY
                s.reserved += reserved
            if ahead is not None and not _foresee(run, ahead, request, produced, target, holds + chunk):
                return _NO_MEMORY
            if store is not None:
                run.cached[request] = holds
                _take(run, store, request, holds)
            slot = _admit(run, 0, _at(max(row, 0)), now)
            slots[slot].chunk = chunk
            used += _units(rules, holds + chunk)
            if store is not None:
                _make_room(run, store, used)
            budget -= chunk
            if ahead is not None:
                _enter_ahead(run, ahead, slot, row, produced, target, holds + chunk)
            if rare and stored > 0:
                _bring_back(run, slot, stored, row == NOBODY, 0, now)
            if row != NOBODY:
                rows[_at(row)].quota -= 1
                if rules.gated:
                    size = rows[row].ring
                    run.recent[rows[row].first + rows[row].admissions % size] = s.iterations
                    rows[row].admissions += 1
        return _NO_ROOM_IN_BATCH

    return _admit_waiting


_admit_waiting = _admission(rare=False)
_admit_waiting_rare = _admission(rare=True)


@_inline
def _serve(run: Run, store: Store | None, held_back: bool, now: float) -> tuple[int, int, bool]:
    """Rules 10 and 11: units used, budget left, and whether it took a walk."""
    s, rules, slots, groups = run.state[0], run.rules[0], run.slots, run.groups
    calendars = run.calendars
    partials = s.partials
    decodes = groups[0].decodes
    budget = rules.budget - decodes
    used = _units_held(groups, calendars, 0) + _growth(groups, calendars, 0, _int(1))
    simple = budget >= 0
    if partials > 0 and simple:
        wanted = 0
        for i in range(partials):
            slot = slots[i].partial
            wanted += min(slots[slot].target - slots[slot].done, rules.chunk)
        last = partials == 1 and slots[0].partial == s.newest
        simple = not held_back and (wanted <= budget or rules.decodes_first or last)
        for i in range(partials):
            slot = slots[i].partial
            chunk = min(slots[slot].target - slots[slot].done, rules.chunk, max(budget, 0))
            slots[slot].chunk = chunk
            budget -= chunk
            used += _units(rules, slots[slot].done + chunk)
        simple = simple and used <= rules.capacity + s.shared
    elif simple:
        while used > rules.capacity + s.shared:
            groups[0].last = now
            if store is not None:
                _make_room(run, store, FAR)  # who is served before the memory ends takes all that is idle
            _preempt(run, store, 0, now)
            budget += 1
            used = _units_held(groups, calendars, 0) + _growth(groups, calendars, 0, _int(1))
    if simple:
        if store is not None:
            _make_room(run, store, used)
        return used, budget, False
    used = _units_held(groups, calendars, 0)
    for i in range(partials):
        used += _units(rules, slots[slots[i].partial].done)
    used, budget = _walk(run, store, held_back, used, now)
    return used, budget, True


@_part
def _fit(groups: Records, calendars: Calendars, room: int, k: int) -> int:
    """Most ticks, at most k, that the chosen groups may run within `room` units."""
    decodes = 0
    for group in range(groups.size):
        decodes += groups[group].chosen * groups[group].decodes
    block = calendars.phase.shape[1]
    if decodes * (k // block + 1) <= room:
        return k
    ticks = room // decodes * block
    room %= decodes
    while block > 1 and ticks < k:
        for group in range(groups.size):
            if groups[group].chosen == 1:
                room -= calendars.phase[group, (-groups[group].clock - ticks) % block]
        if room < 0:
            break
        ticks += 1
    return min(k, ticks)


@_part
def _pause(s: Pointer, slots: Records, groups: Records, calendars: Calendars, now: float) -> None:
    """Stop the decodes the budget did not reach (`chunk` 0) from now on; `_resume` lets them go on."""
    slot = s.oldest
    while slot != NOBODY:
        if slots[slot].decodes == 1 and slots[slot].chunk == 0:
            slots[slot].target = slots[slot].key - groups[0].clock
            slots[slot].done = _stop_decode(slots, groups, calendars, 0, slot)
            slots[slot].decodes = _PAUSED
            if slots[slot].stalled == AT_ONCE:
                slots[slot].stalled = now
                s.stalls += 1
        slot = slots[slot].newer


@_part
def _resume(s: Pointer, slots: Records, groups: Records, calendars: Calendars) -> None:
    """Let those that paused decode from the next iteration on, with as much to go as before."""
    group = _int(0)
    slot = s.oldest
    while slot != NOBODY:
        if slots[slot].decodes == _PAUSED:
            _start_decode(slots, groups, calendars, group, slot, slots[slot].done, slots[slot].target)
        slot = slots[slot].newer


@_part
def _rest(run: Run, now: float) -> None:
    """Rule 19b: from now on no decode runs; those that ran until now are stalled.

    They are the newest: whoever was stalled before is older than all who decoded since.
    """
    s, slots = run.state[0], run.slots
    slot = s.newest
    while slot != NOBODY:
        if slots[slot].decodes == 1:
            if slots[slot].stalled != AT_ONCE:
                return
            slots[slot].stalled = now
            s.stalls += 1
        slot = slots[slot].older


@_inline
def _prefill(run: Run, now: float) -> None:
    """The chunks of the iteration that ended now are computed."""
    s, slots, groups = run.state[0], run.slots, run.groups
    left = 0
    for i in range(s.partials):
        slot = _at(slots[i].partial)
        slots[slot].done += slots[slot].chunk
        if slots[slot].done == slots[slot].target:
            group = 0 if groups.size == 1 else run.row[slots[slot].request]
            _emit(run, group, slot, now)
        else:
            slots[left].partial = slot
            left += 1
    s.partials = left


@_part
def _glide(run: Run, now: float) -> float:
    """Go on from decision to decision while all fit: who is in service runs, who is admitted runs whole.

    The decisions of `continuous` for one row that nothing holds up, after the warm-up. The first that asks for more
    (a preemption, a part of a prompt, nobody in service, the end) is left to it, with whom this one admitted so far.
    """
    if now < run.rules[0].warmup:
        return now
    s, rules, slots = run.state[0], run.rules[0], run.slots
    group, calendars, row, coef = run.groups[0], run.calendars, run.rows[0], run.coefficients
    block = calendars.phase.shape[1]
    busy, kv_area, resident_area, gap_s = s.busy, s.kv_area, s.resident_area, s.gap_s
    iterations = sizes = tokens = 0
    peak = held_before = residents_before = 0
    stop = min(s.until, s.sample_at)
    first_row = _int(0)
    while True:
        _join(run, now)
        decodes, reads = group.decodes, group.held + group.decodes
        budget = rules.budget - decodes
        used = reads
        if block > 1:
            used = group.units + _growth(run.groups, calendars, 0, _int(1))
        if now >= stop or budget < 0 or used > rules.capacity:
            break
        holds = reads
        prompts = _int(0)
        attention = 0.0
        ended = False
        whole = True
        while budget > 0 and s.residents < rules.slots and row.head < row.tail and not ended:
            request = _at(run.order[_at(row.head)])
            cached = _cached(run, request)
            chunk = run.prompt[request] - cached
            units = _units(rules, run.prompt[request])
            limit = rules.admission if s.residents > 0 else rules.capacity
            ended = used + units > limit
            whole = chunk <= min(budget, rules.chunk)
            if rules.reserve > 0 and whole and not ended:
                reserved = _units(rules, run.prompt[request] + rules.reserve - 1)
                ended = s.residents > 0 and s.reserved + reserved > limit
                if not ended:
                    s.reserved += reserved
            if not whole:
                break
            if not ended:
                slot = _admit(run, 0, first_row, now)
                slots[slot].chunk = chunk
                used += units
                budget -= chunk
                prompts += chunk
                holds += cached + chunk
                attention += chunk * (cached + 0.5 * chunk)
        residents, partials = s.residents, s.partials
        if residents == 0 or not whole:
            break
        if partials == 0:
            k = _to_completion(run.groups, calendars, 0)
            room = rules.capacity - _units_held(run.groups, calendars, 0)
            if decodes * (k if block == 1 else k // block + 1) > room:
                k = _fit(run.groups, calendars, room, k)
            wake = stop
            if not ended and budget > 0 and residents < rules.slots and s.arrived < run.arrival.size:
                wake = min(wake, run.arrival[s.arrived])
            k, duration, area, first, last, slope = decode_run(coef, decodes, reads, reads, now, wake, k)
            if now + duration > rules.horizon:
                break
            holds = reads + decodes * (k - 1)
            if slope == BENT:
                _spread_gaps_bent(run.gaps, coef, run.rules, decodes, reads, k)
            else:
                _spread_gaps(rules, run.gaps, first, last, slope, decodes, k)
        else:
            k = 1
            duration = batch_time(coef, prompts, decodes, reads, attention)
            if now + duration > rules.horizon:
                break
            area = duration * holds
            run.gaps[_bucket(rules, duration)] += decodes
        now += duration
        busy += duration
        kv_area += area
        resident_area += duration * residents
        gap_s += decodes * duration
        iterations += k
        sizes += k * decodes + partials
        tokens += prompts - partials
        peak = max(peak, holds)
        held_before = holds
        residents_before = residents
        _tick(run.groups, calendars, 0, k)
        _complete(run, 0, now)
        for i in range(partials):
            slot = _at(slots[i].partial)
            slots[slot].done = slots[slot].target
            _emit(run, first_row, slot, now)
        s.partials = 0
    s.busy, s.kv_area, s.resident_area, s.gap_s = busy, kv_area, resident_area, gap_s
    if iterations > 0:
        s.iterations += iterations
        s.batch_sizes += sizes
        s.batch_tokens += sizes + tokens
        s.emitted += sizes
        s.peak_kv = max(s.peak_kv, peak)
        s.held_before = held_before
        s.residents_before = residents_before
    return now


def _continuous(rare: bool) -> Callable[[Run, Ahead | None, Store | None], None]:
    """The loop, with or without what few runs need; numba drops branches on a constant before it compiles."""

    @_loop
    def continuous(run: Run, ahead: Ahead | None, store: Store | None) -> None:
        """Run any rule but `wait` on to its end, or to the first decision instant that is
        not before `until`; called again with a later `until`, it goes on from there."""
        s, rules, slots = run.state[0], run.rules[0], run.slots
        groups, rows, calendars, coef = run.groups, run.rows, run.calendars, run.coefficients
        now = s.now
        overtaken = rows.size > 1  # who arrives may come before those who wait
        if ahead is not None:
            overtaken = overtaken or ahead.state[0].shortest == 1
        plain = rows.size == 1 and rules.interval == 1 and not (rules.gated or rules.static)
        turns = 0  # until it is worth asking `_glide` again
        while True:
            turns -= 1
            alone = s.partials + s.returned + s.stalls == 0
            if not rare and ahead is None and store is None and plain and turns < 0 and alone:
                iterations = s.iterations
                now = _glide(run, now)
                if s.iterations == iterations:
                    turns = 8
            arrived = s.arrived
            _join(run, now)
            if ahead is not None:
                for i in range(arrived, s.arrived):
                    _queue_by_length(run, ahead, i)
            if rare and (now < s.until or now >= rules.horizon):
                _depart(run, ahead, now)
            held = groups[0].held
            for i in range(s.partials):
                held += slots[_at(slots[i].partial)].done
            if now >= s.until:
                s.now = now
                if now >= rules.horizon:
                    _close(s, rules.warmup, groups, run.returned, now, held, _int(AT_HORIZON))
                return
            if now >= s.sample_at:
                _sample(s, run.occupancy, held, now)

            # The decision.
            preempted = s.preempted
            held_back = s.since_prefill < rules.interval - 1 and s.queue_left == 0 and groups[0].decodes > 0
            ended = _NO_ROOM_IN_BATCH
            resting = returning = False
            if rare and rules.prompts_alone:
                returning = s.stored > 0
            if rare and rules.prompts_alone and not returning:  # rule 19b
                _open_rows(run, now)
                ended = _admit_waiting_rare(
                    run, ahead, store, _units_held(groups, calendars, 0), rules.budget, now
                )
                resting = s.partials > 0
            used = budget = 0
            walked = False
            if not resting:
                used, budget, walked = _serve(run, store, held_back, now)
            evicting = s.preempted > preempted
            if ahead is not None:
                ahead.state[0].blocked = FAR
                ahead.state[0].incomplete = 0
                if s.partials > 0 or evicting:
                    _look_ahead(run, ahead, s.preempted - preempted)
            cleared = not rules.gated
            closed = held_back or evicting or (rules.static and s.residents > 0)
            if rare:
                closed = closed or (rules.prompts_alone and not returning)
            while not closed:
                _open_rows(run, now)
                if rare and returning:
                    rows[0].quota = 0
                if rare:
                    ended = _admit_waiting_rare(run, ahead, store, used, budget, now)
                else:
                    ended = _admit_waiting(run, ahead, store, used, budget, now)
                if s.residents > 0 or cleared:
                    break
                for j in range(rows.size):  # rule 18
                    rows[j].passed = rows[j].admissions
                cleared = True
            held = groups[0].held
            for i in range(s.partials):
                held += slots[_at(slots[i].partial)].done
            if not held_back:
                s.queue_left = s.waiting + s.returned > 0

            # Nobody in service: wait for an arrival or a timer.
            if s.residents == 0:
                if evicting:
                    continue
                wake = math.inf
                if s.arrived < run.arrival.size:
                    wake = run.arrival[s.arrived]
                for j in range(rows.size):
                    if rules.gated and rows[j].threshold > 0:
                        wake = min(wake, _next_hold(rows, run.order, run.arrival, run.fate, j, now))
                if rare:
                    wake = min(wake, _next_deadline(run))
                wake = min(wake, s.until)
                if wake == math.inf:
                    verdict = FINISHED if s.waiting == 0 else STUCK
                    _close(s, rules.warmup, groups, run.returned, now, held, verdict)
                    return
                now = wake
                continue

            if walked:
                _pause(s, slots, groups, calendars, now)
            decodes = 0 if resting else groups[0].decodes
            reads = 0 if resting else groups[0].held + decodes
            if s.partials == 0 and not walked:
                # Decodes only: as many iterations as nothing can change in.
                k = _to_completion(groups, calendars, 0)
                if rules.capacity < FAR:
                    room = rules.capacity + s.shared - _units_held(groups, calendars, 0)
                    k = _fit(groups, calendars, room, k)
                wake = s.sample_at
                if rare:
                    wake = min(wake, _next_deadline(run))
                if evicting or (rare and s.moved > 0):
                    k = 1
                elif held_back:
                    k = min(k, rules.interval - 1 - s.since_prefill)
                elif ended == _NOBODY_MAY or (ended == _NO_MEMORY and s.returned == 0 and overtaken):
                    if s.arrived < run.arrival.size:
                        wake = min(wake, run.arrival[s.arrived])
                    if rules.gated:
                        for j in range(rows.size):
                            if rows[j].threshold > 0 and rows[j].head < rows[j].tail:
                                wake = min(wake, _next_hold(rows, run.order, run.arrival, run.fate, j, now))
                                if _in_window(run, j) == rows[j].threshold:
                                    size = rows[j].ring
                                    oldest = run.recent[rows[j].first + rows[j].passed % size]
                                    k = min(k, oldest + rows[j].period - s.iterations)
                elif rules.interval > 1 and s.waiting + s.returned == 0 and s.arrived < run.arrival.size:
                    wake = min(wake, run.arrival[s.arrived])  # whether anybody waits matters to rule 16
                if ahead is not None:
                    k = min(k, ahead.state[0].blocked)
                if (
                    store is not None
                    and ended == _NO_MEMORY
                    and (not rules.whole_prompt or ahead is not None)
                ):
                    k = 1  # who finds less, because idle blocks are dropped, may ask for less
                k, duration, area, first, last, slope = _run_length(run, decodes, reads, reads, now, wake, k)
                holds = reads + decodes * (k - 1)
                prompts = 0
                size = tokens = emitted = decodes
            else:
                # One iteration with prompts, or with residents that pause.
                k = 1
                prompts = _int(0)
                size = emitted = decodes
                attention = 0.0
                for i in range(s.partials):
                    slot = _at(slots[i].partial)
                    chunk = slots[slot].chunk
                    if chunk > 0:
                        size += 1
                        prompts += chunk
                        attention += chunk * (slots[slot].done + 0.5 * chunk)
                        emitted += slots[slot].done + chunk == slots[slot].target
                tokens = decodes + prompts
                if tokens == 0:
                    _resume(s, slots, groups, calendars)
                    continue  # rule 12
                slope = 0.0
                duration = first = last = batch_time(coef, prompts, decodes, reads, attention)
                holds = held + tokens
                area = duration * holds
            if rare and s.moved > 0:  # rule 9a; k is 1
                moving = s.moved / rules.swap_bandwidth
                duration += moving
                first += moving
                last += moving
                area = duration * holds
            s.held_before = holds
            s.residents_before = s.residents
            if not _account(run, now, duration, area, holds, size, tokens, emitted, k):
                if walked:
                    _resume(s, slots, groups, calendars)
                now = rules.horizon
                continue
            counted = now + duration > rules.warmup
            if counted:
                _count_gaps(run, decodes, reads, k, first, last, slope, duration)
            if rare and resting:
                _rest(run, now)
            elif s.stalls > 0:
                _end_stalls(s, rules, slots, run.gaps, first, now, counted)
            if rare:
                s.moved = 0
            now += duration
            s.since_prefill = 0 if prompts > 0 else min(s.since_prefill + k, FAR)
            if not resting:
                _tick(groups, calendars, 0, k)
                if store is not None:
                    if k > 1:
                        _make_room(run, store, _units_held(groups, calendars, 0))
                    _end_iteration(run, store)
                _complete(run, 0, now)
            if walked:
                _resume(s, slots, groups, calendars)
            _prefill(run, now)
            if ahead is not None:
                _pass_ahead(run, ahead, s.residents_before - s.residents, k, walked)

    return continuous


continuous = _continuous(rare=False)
continuous_rare = _continuous(rare=True)


# --------------------------------------------------------------------------- wait


@_part
def _has_expired(run: Run, row: int, now: float) -> bool:
    """Rule 23: somebody of the row, waiting or resident, has not been served for `hold`."""
    groups, rows, returned = run.groups, run.rows, run.returned
    hold = rows[row].hold
    if hold == math.inf:
        return False
    if groups[row].decodes > 0 and now >= groups[row].last + hold:
        return True
    if rows[row].head < rows[row].tail and now >= run.arrival[run.order[rows[row].head]] + hold:
        return True
    request = groups[row].top
    while request != NOBODY:
        if now >= returned[request].served + hold:
            return True
        request = returned[request].below
    return False


@_part
def _next_timer(run: Run, now: float) -> float:
    """Rule 23: the first instant later than now at which a hold expires."""
    groups, rows, returned = run.groups, run.rows, run.returned
    wake = math.inf
    for j in range(rows.size):
        hold = rows[j].hold
        if hold == math.inf or rows[j].threshold == 0:
            continue
        wake = min(wake, _next_hold(rows, run.order, run.arrival, run.fate, j, now))
        if groups[j].decodes > 0 and groups[j].last + hold > now:
            wake = min(wake, groups[j].last + hold)
        request = groups[j].top
        while request != NOBODY:
            if returned[request].served + hold > now:
                wake = min(wake, returned[request].served + hold)
            request = returned[request].below
    return wake


@_inline
def _start_block(run: Run, now: float) -> None:
    """Rule 20: choose the rows whose gate is met and admit their cohorts."""
    s, rules, groups, rows = run.state[0], run.rules[0], run.groups, run.rows
    for j in range(rows.size):
        waiting = groups[j].depth + _newcomers(rows, j)
        groups[j].chosen = 0
        if rows[j].threshold > 0:
            groups[j].chosen = waiting >= rows[j].gate or _has_expired(run, j, now)
    for i in range(rows.size):
        j = rows[i].turn
        if groups[j].chosen == 1:
            waiting = groups[j].depth + _newcomers(rows, j)
            for _ in range(min(rows[j].threshold, waiting, rules.slots - s.residents)):
                _admit_whole(run, j, now)


@_inline
def _admit_whole(run: Run, row: int, now: float) -> None:
    """Admit the next in line of the row, whose whole prompt runs in the first iteration of the block."""
    slots = run.slots
    slot = _admit(run, row, row, now)
    stored = run.returned[slots[slot].request].stored
    if stored > 0:
        _bring_back(run, slot, stored, True, row, now)
    if slots[slot].decodes == 0:
        slots[slot].chunk = slots[slot].target - slots[slot].done


@_part
def _end_returns(run: Run, first: float, now: float, counted: bool) -> None:
    """Those whose KV came back emit in the iteration of `first` seconds from now on, counted as their group."""
    s, slots, groups, gaps = run.state[0], run.slots, run.groups, run.gaps
    slot = s.newest
    while slot != NOBODY and s.stalls > 0:
        if slots[slot].decodes == 1 and slots[slot].stalled != AT_ONCE:
            group = run.row[slots[slot].request]
            if counted:
                taken = first + max(now - groups[group].last, 0.0)
                gap = first + (now - slots[slot].stalled)
                gaps[_bucket(run.rules[0], taken)] -= 1
                gaps[_bucket(run.rules[0], gap)] += 1
                s.gap_s += gap - taken
            slots[slot].stalled = AT_ONCE
            s.stalls -= 1
        slot = slots[slot].older


# --------------------------------------------------------------------------- nested-wait

_QUEUED = 2


@_part
def _queue_up(run: Run, segment: int, slot: int, behind: int, held: int, now: float) -> None:
    """Let a resident stand still before `segment`, right after the slot `behind` of its queue (or first)."""
    slots, segments, rules = run.slots, run.segments, run.rules[0]
    ahead = segments[segment].head if behind == NOBODY else slots[behind].later
    slots[slot].decodes = _QUEUED
    slots[slot].segment = segment
    slots[slot].origin = held
    slots[slot].earlier = behind
    slots[slot].later = ahead
    if behind == NOBODY:
        segments[segment].head = slot
    else:
        slots[behind].later = slot
    if ahead == NOBODY:
        segments[segment].tail = slot
    else:
        slots[ahead].earlier = slot
    segments[segment].queued += 1
    segments[segment].held += held
    segments[segment].units += _units(rules, held)
    run.returned[slots[slot].request].served = now


@_inline
def _dequeue(run: Run, slot: int) -> int:
    """Take a resident out of the queue of its segment; return the KV tokens it holds."""
    slots, segments, rules = run.slots, run.segments, run.rules[0]
    segment, held = slots[slot].segment, slots[slot].origin
    before, after = slots[slot].earlier, slots[slot].later
    if before == NOBODY:
        segments[segment].head = after
    else:
        slots[before].later = after
    if after == NOBODY:
        segments[segment].tail = before
    else:
        slots[after].earlier = before
    segments[segment].queued -= 1
    segments[segment].held -= held
    segments[segment].units -= _units(rules, held)
    return held


@_part
def _enter_segment(run: Run, segment: int, slot: int, produced: int, held: int, positions: int) -> None:
    """Let a resident run in `segment`, at most `positions` iterations of which are before it."""
    slots, groups, calendars = run.slots, run.groups, run.calendars
    to_go = min(run.output[slots[slot].request] - produced, positions)
    slots[slot].segment = segment
    slots[slot].resumed = produced - groups[segment].clock
    _start_decode(slots, groups, calendars, segment, slot, held, to_go)


@_part
def _enter_from_queue(run: Run, segment: int, slot: int, produced: int, held: int) -> None:
    """Let a resident that stood still, or comes back from the host, run in `segment` from its first position."""
    s, slots, groups = run.state[0], run.slots, run.groups
    slots[s.entered].entered = slot
    s.entered += 1
    groups[segment].entered += 1
    slots[slot].chunk = groups[segment].clock
    _enter_segment(run, segment, slot, produced, held, run.segments[segment].positions)


@_part
def _preempt_nested(run: Run, now: float) -> None:
    """Rule 8: the newest resident loses its place, wherever it is."""
    s, slots, groups, returned = run.state[0], run.slots, run.groups, run.returned
    slot = s.newest
    request = slots[slot].request
    produced = slots[slot].resumed
    held = slots[slot].done
    served = returned[request].served
    if slots[slot].decodes == 1:
        segment = slots[slot].segment
        produced += groups[segment].clock
        if groups[segment].clock > slots[slot].chunk:
            served = groups[segment].last
        else:  # it entered in this decision
            groups[segment].entered -= 1
        held = _stop_decode(slots, groups, run.calendars, segment, slot)
    elif slots[slot].decodes == _QUEUED:
        held = _dequeue(run, slot)
    else:
        s.partials -= 1  # prefilling slots are listed in the order of admission: it is the last
        if run.preemptions[request] == 0:
            served = run.arrival[request]
    _return(run, 0, slot, produced, held, served, now)


@_part
def _first_queued_after(run: Run, segment: int, now: float) -> float:
    """Rule 23: smallest s + hold later than now in the queue of `segment`, whose times s do not decrease."""
    hold = run.rows[0].hold
    slot = run.segments[segment].head
    while slot != NOBODY:
        expiry = run.returned[run.slots[slot].request].served + hold
        if expiry > now:
            return expiry
        slot = run.slots[slot].later
    return math.inf


@_part
def _segments_to_run(run: Run, now: float) -> int:
    """Rule 28's K."""
    groups, rows, segments, returned = run.groups, run.rows, run.segments, run.returned
    count = segments.size
    last = 0
    if groups[0].depth + _newcomers(rows, 0) >= segments[0].threshold:
        last = 1
        while last < count and segments[last].queued >= segments[last].threshold:
            last += 1
    hold = rows[0].hold
    if hold == math.inf:
        return last
    for k in range(count - 1, last - 1, -1):
        if groups[k].decodes > 0 and now >= groups[k].last + hold:
            return k + 1
        if k > 0:
            slot = segments[k].head
            if slot != NOBODY and now >= returned[run.slots[slot].request].served + hold:
                return k + 1
        elif _has_expired(run, 0, now):
            return 1
    return last


@_part
def _next_timer_nested(run: Run, now: float) -> float:
    """Rule 23: the first instant later than now at which a hold expires."""
    groups, hold = run.groups, run.rows[0].hold
    wake = _next_timer(run, now)
    if hold == math.inf:
        return wake
    for k in range(1, groups.size):
        wake = min(wake, _first_queued_after(run, k, now))
        if groups[k].decodes > 0 and groups[k].last + hold > now:
            wake = min(wake, groups[k].last + hold)
    return wake


@_inline
def _start_segments(run: Run, now: float) -> None:
    """Rule 28: choose the segments, let n_k of every queue enter, admit n_1."""
    s, rules, slots, groups = run.state[0], run.rules[0], run.slots, run.groups
    rows, segments = run.rows, run.segments
    last = _segments_to_run(run, now)
    for k in range(segments.size):
        groups[k].chosen = k < last
        groups[k].entered = 0
    s.entered = 0
    for k in range(1, last):
        for _ in range(min(segments[k].threshold, segments[k].queued)):
            slot = segments[k].head
            held = _dequeue(run, slot)
            _enter_from_queue(run, k, slot, slots[slot].resumed, held)
    if last > 0:
        waiting = groups[0].depth + _newcomers(rows, 0)
        for _ in range(min(segments[0].threshold, waiting, rules.slots - s.residents)):
            _admit_whole(run, 0, now)


@_part
def _complete_segment(run: Run, segment: int, now: float) -> None:
    """Let those of the segment leave or go on whose last iteration in it ended now.

    They are met in reverse, so each that goes on is put before the one met last.
    """
    slots, groups, calendars = run.slots, run.groups, run.calendars
    clock = groups[segment].clock
    behind = NOBODY
    if segment + 1 < groups.size:
        behind = run.segments[segment + 1].tail
    slot = calendars.heads[segment * calendars.days + (clock & (calendars.days - 1))]
    while slot != NOBODY:
        following = slots[slot].later
        if slots[slot].key == clock:
            held = _stop_decode(slots, groups, calendars, segment, slot)
            produced = slots[slot].resumed + clock
            if produced == run.output[slots[slot].request]:
                _finish(run, slot, now)
            else:
                slots[slot].resumed = produced
                _queue_up(run, segment + 1, slot, behind, held, now)
        slot = following


@_part
def _prefill_nested(run: Run, now: float) -> None:
    """The prompts of the iteration that ended now are computed: position 0 is done."""
    s, slots, segments = run.state[0], run.slots, run.segments
    behind = NOBODY
    if segments.size > 1:
        behind = segments[1].tail
    for i in range(s.partials):
        slot = slots[i].partial
        request = slots[slot].request
        produced = slots[slot].resumed + 1
        if produced == 1:
            run.first_token[request] = now
        elif now > run.rules[0].warmup:
            _count_gap(run, now - run.returned[request].served)
        if produced == run.output[request]:
            _finish(run, slot, now)
        elif segments[0].positions == 1:
            slots[slot].resumed = produced
            _queue_up(run, 1, slot, behind, slots[slot].target, now)
            behind = slot
        else:
            slots[slot].chunk = NOBODY
            _enter_segment(run, 0, slot, produced, slots[slot].target, segments[0].positions - 1)
    s.partials = 0


@_inline
def _lengthen_nested(run: Run, first: float, now: float) -> None:
    """In the iteration of `first` seconds from now on emit those who stood still: segments, and out of queues."""
    s, slots, groups = run.state[0], run.slots, run.groups
    for k in range(groups.size):
        if groups[k].chosen == 1 and groups[k].last < now:
            longer = groups[k].decodes - groups[k].entered
            if longer > 0:
                _lengthen_gaps(s, run.rules[0], run.gaps, longer, first, now - groups[k].last)
    for i in range(s.entered):
        slot = slots[i].entered
        if slots[slot].decodes == 1:  # else it was preempted at once
            missed = now - run.returned[slots[slot].request].served
            if missed > 0.0:
                _lengthen_gaps(s, run.rules[0], run.gaps, 1, first, missed)


# --------------------------------------------------------------------------- blocks: wait and nested-wait


def _serving(segmented: bool) -> Callable[[Run, float], tuple[int, int]]:
    """Rule 21 before an iteration, for groups by row or by segment."""

    @(_part if segmented else _inline)
    def _serve_block(run: Run, now: float) -> tuple[int, int]:
        """Rule 21: preempt until the next iteration fits; decodes to serve and tokens they read."""
        s, rules, slots = run.state[0], run.rules[0], run.slots
        groups, segments, calendars = run.groups, run.segments, run.calendars
        while True:
            decodes = reads = needed = 0
            for j in range(groups.size):
                needed += _units_held(groups, calendars, j)
                if segmented:
                    needed += segments[j].units
                if groups[j].chosen == 1 and groups[j].decodes > 0:
                    decodes += groups[j].decodes
                    reads += groups[j].held + groups[j].decodes
                    needed += _growth(groups, calendars, j, _int(1))
            for i in range(s.partials):
                needed += _units(rules, slots[slots[i].partial].target)
            if needed <= rules.capacity or decodes + s.partials == 0:
                return decodes, reads
            if segmented:
                _preempt_nested(run, now)
            else:
                _preempt(run, None, run.row[slots[s.newest].request], now)

    return _serve_block


_serve_rows = _serving(segmented=False)
_serve_segments = _serving(segmented=True)


def _blocks(segmented: bool, rare: bool) -> Callable[[Run], None]:
    """The loop of `nested-wait` or of `wait`, with or without what few runs need."""

    @_loop
    def blocks(run: Run) -> None:
        """Run the rule on to its end or to `until`, as `continuous` does."""
        s, rules, slots = run.state[0], run.rules[0], run.slots
        groups, segments, calendars, coef = run.groups, run.segments, run.calendars, run.coefficients
        now = s.now
        left = s.left
        while True:
            _join(run, now)
            if rare and (now < s.until or now >= rules.horizon):
                _depart(run, None, now)
            held = _int(0)
            for j in range(groups.size):
                held += groups[j].held
                if segmented:
                    held += segments[j].held
            for i in range(s.partials):  # none but where the horizon cut their iteration
                held += slots[_at(slots[i].partial)].done
            if now >= s.until:
                s.now = now
                s.left = left
                if now >= rules.horizon:
                    _close(s, rules.warmup, groups, run.returned, now, held, _int(AT_HORIZON))
                return
            if now >= s.sample_at:
                _sample(s, run.occupancy, held, now)

            # The decision.
            decodes = reads = 0
            if left > 0:
                if segmented:
                    decodes, reads = _serve_segments(run, now)
                else:
                    decodes, reads = _serve_rows(run, now)
            if decodes == 0:
                left = rules.block_iterations
                if segmented:
                    _start_segments(run, now)
                    decodes, reads = _serve_segments(run, now)
                else:
                    _start_block(run, now)
                    decodes, reads = _serve_rows(run, now)
            held = _int(0)
            for j in range(groups.size):
                held += groups[j].held
                if segmented:
                    held += segments[j].held
            for i in range(s.partials):
                held += slots[_at(slots[i].partial)].done

            # Nobody to serve: wait for an arrival, a timer or a deadline.
            if decodes + s.partials == 0:
                left = 0
                if segmented:
                    wake = _next_timer_nested(run, now)
                else:
                    wake = _next_timer(run, now)
                if s.arrived < run.arrival.size:
                    wake = min(wake, run.arrival[s.arrived])
                if rare:
                    wake = min(wake, _next_deadline(run))
                wake = min(wake, s.until)
                if wake == math.inf:
                    verdict = FINISHED if s.waiting + s.returned + s.residents == 0 else STUCK
                    _close(s, rules.warmup, groups, run.returned, now, held, verdict)
                    return
                idle = wake - max(now, rules.warmup)
                if idle > 0.0:
                    s.kv_area += idle * held
                    s.resident_area += idle * s.residents
                now = wake
                continue

            if s.partials == 0:
                k = left
                room = rules.capacity
                for j in range(groups.size):
                    room -= _units_held(groups, calendars, j)
                    if segmented:
                        room -= segments[j].units
                    if groups[j].chosen == 1 and groups[j].decodes > 0:
                        k = min(k, _to_completion(groups, calendars, j))
                if rules.capacity < FAR and k > 1:
                    k = _fit(run.groups, calendars, room, k)
                wake = s.sample_at
                if rare:
                    wake = min(wake, _next_deadline(run))
                    if s.moved > 0:
                        k = 1
                holds = held + decodes
                k, duration, area, first, last, slope = _run_length(run, decodes, reads, holds, now, wake, k)
                holds += decodes * (k - 1)
                size = tokens = emitted = decodes
            else:
                k = 1
                prompts = _int(0)
                emitted = size = decodes + s.partials
                attention = 0.0
                for i in range(s.partials):
                    slot = slots[i].partial
                    prompts += slots[slot].chunk
                    attention += slots[slot].chunk * (slots[slot].done + 0.5 * slots[slot].chunk)
                tokens = decodes + prompts
                holds = held + tokens
                slope = 0.0
                duration = first = last = batch_time(coef, prompts, decodes, reads, attention)
                area = duration * holds
            if rare and s.moved > 0:  # rule 9a; k is 1
                moving = s.moved / rules.swap_bandwidth
                duration += moving
                first += moving
                last += moving
                area = duration * holds
            s.held_before = holds
            s.residents_before = s.residents
            if not _account(run, now, duration, area, holds, size, tokens, emitted, k):
                now = rules.horizon
                continue
            counted = now + duration > rules.warmup
            if counted:
                _count_gaps(run, decodes, reads, k, first, last, slope, duration)
                if segmented:
                    _lengthen_nested(run, first, now)
                else:
                    for j in range(groups.size):
                        if groups[j].chosen == 1 and groups[j].decodes > 0 and groups[j].last < now:
                            _lengthen_gaps(
                                s, run.rules[0], run.gaps, groups[j].decodes, first, now - groups[j].last
                            )
            if rare and s.stalls > 0:
                _end_returns(run, first, now, counted)
            if rare:
                s.moved = 0
            s.entered = 0
            now += duration
            left -= k
            for j in range(groups.size):
                groups[j].entered = 0
                if groups[j].chosen == 1:
                    groups[j].last = now
                    _tick(groups, calendars, j, k)
                    if segmented:
                        _complete_segment(run, j, now)
                    else:
                        _complete(run, j, now)
            if segmented:
                _prefill_nested(run, now)
            else:
                _prefill(run, now)

    return blocks


wait = _blocks(segmented=False, rare=False)
wait_rare = _blocks(segmented=False, rare=True)
nested = _blocks(segmented=True, rare=False)
nested_rare = _blocks(segmented=True, rare=True)


# --------------------------------------------------------------------------- several replicas behind a router

SHORTEST_QUEUE, LEAST_KV, TWO_CHOICES = range(3)

#: Where the slots of a replica lie, its calendars' `phase`, which is as wide as its blocks, the calendar and the
#: trees of its forecasts, and the deadlines under its timeouts.
REPLICA = _record_type(
    "first_slot last_slot first_phase block first_day last_day first_word last_word first_node last_node"
    " first_deadline last_deadline"
)


@_inline
def _replica(runs: Run, phase: Ints, layout: Records, p: int) -> Run:
    """Replica p of P: its share of arrays that hold one replica after the other; the path is shared by all."""
    count = layout.size
    pieces = runs.coefficients.shape[0] // count
    rows = runs.rows.size // count
    groups = runs.groups.size // count
    rings = runs.recent.size // count
    places = runs.order.size // count
    segments = runs.segments.size // count
    days = runs.calendars.days
    words = groups * _words(days)
    at = layout[p]
    first = at.first_phase
    return Run(
        rules=runs.rules[p : p + 1],
        state=runs.state[p : p + 1],
        coefficients=runs.coefficients[p * pieces : (p + 1) * pieces],
        arrival=runs.arrival,
        prompt=runs.prompt,
        output=runs.output,
        cached=runs.cached,
        row=runs.row,
        order=runs.order[p * places : (p + 1) * places],
        rows=runs.rows[p * rows : (p + 1) * rows],
        recent=runs.recent[p * rings : (p + 1) * rings],
        slots=runs.slots[at.first_slot : at.last_slot],
        groups=runs.groups[p * groups : (p + 1) * groups],
        segments=runs.segments[p * segments : (p + 1) * segments],
        calendars=Calendars(
            days=days,
            heads=runs.calendars.heads[p * groups * days : (p + 1) * groups * days],
            bits=runs.calendars.bits[p * words : (p + 1) * words],
            phase=phase[first : first + groups * at.block].reshape((groups, at.block)),
        ),
        returned=runs.returned,
        admitted=runs.admitted,
        first_token=runs.first_token,
        finish=runs.finish,
        preemptions=runs.preemptions,
        gaps=runs.gaps,
        occupancy=runs.occupancy,
        deadline=runs.deadline[at.first_deadline : at.last_deadline],
        leaver=runs.leaver[at.first_deadline : at.last_deadline],
        left=runs.left,
        fate=runs.fate,
        owner=runs.owner,
    )


@_inline
def _replica_ahead(ahead: Ahead, layout: Records, p: int) -> Ahead:
    """The same of what look-ahead and orders by length need."""
    count = layout.size
    rows = ahead.heaps.size // count
    places = ahead.heap.size // count
    at = layout[p]
    return Ahead(
        state=ahead.state[p : p + 1],
        believed=ahead.believed,
        lengths=ahead.lengths,
        forecasts=ahead.forecasts[at.first_slot : at.last_slot],
        days=ahead.days[at.first_day : at.last_day],
        bits=ahead.bits[at.first_word : at.last_word],
        tree=ahead.tree[at.first_node : at.last_node],
        place=ahead.place,
        requests=ahead.requests,
        heaps=ahead.heaps[p * rows : (p + 1) * rows],
        heap=ahead.heap[p * places : (p + 1) * places],
    )


@_part
def _overdue(run: Run, instant: float, tokens: bool) -> int:
    """How many wait whose deadline has come by the instant, or the KV tokens that they need at admission."""
    s, returned = run.state[0], run.returned
    seen = 0
    for turn in range(
        2
    ):  # a request with both deadlines counts once: it is marked, and the marks are taken back
        i = s.leaving
        while i < run.deadline.size and run.deadline[i] <= instant:
            request, always = run.leaver[i] >> 1, run.leaver[i] & 1
            i += 1
            if run.owner[request] != run.rules[0].replica:
                continue
            if turn == 1:
                if run.fate[request] == _MARKED:
                    run.fate[request] = 0
                continue
            if run.fate[request] != 0 or not math.isnan(run.finish[request]):
                continue
            newcomer = math.isnan(run.admitted[request])
            if newcomer or (always == 1 and _on_stack(run, request)):
                run.fate[request] = _MARKED
                seen += 1
                if tokens:
                    produced = run.rules[0].handed if newcomer else returned[request].produced
                    seen += run.prompt[request] + produced - 1
    return seen


@_part
def _on_stack(run: Run, request: int) -> bool:
    """Whether the request waits after a preemption."""
    other = run.groups[_stack(run, request)].top
    while other != NOBODY:
        if other == request:
            return True
        other = run.returned[other].below
    return False


@_inline
def _seen(replica: Run, instant: float, rule: int) -> int:
    """What the router sees of a replica at an instant: requests in the system, or KV held and asked for."""
    s, groups = replica.state[0], replica.groups
    running = s.now > instant
    gone = _overdue(replica, instant, rule == LEAST_KV) if replica.deadline.size > 0 else 0
    if rule != LEAST_KV:
        return s.waiting + s.returned + (s.residents_before if running else s.residents) - gone
    held = s.held_before
    if not running:
        held = 0
        for j in range(groups.size):
            held += groups[j].held
            if replica.segments.size > 0:
                held += replica.segments[j].held
        for k in range(s.partials):
            held += replica.slots[replica.slots[k].partial].done
    return held + s.queued - gone


CONTINUOUS, CONTINUOUS_RARE, WAIT, WAIT_RARE, NESTED, NESTED_RARE = range(6)

_Route = Callable[[Run, "Ahead | None", Ints, Records, int, Ints, Floats], None]


def _routing(loop: int) -> _Route:
    """The router that looks at replicas run by one of the loops: a number, since numba's cache can tell those apart."""

    @_loop
    def route(
        runs: Run,
        ahead: Ahead | None,
        phase: Ints,
        layout: Records,
        rule: int,
        fits: Ints,
        draws: Floats,
    ) -> None:
        """Choose a replica for every request, in order of arrival; rules of `fluidsched.simulation.cluster`.

        `fits` (N, P): whether the replica's server can hold the request at all; `draws` (N, 2): uniform numbers.
        Fills `runs.owner`, `NOBODY` where the request fits nowhere.
        """
        count = layout.size
        rows = runs.rows.size // count
        places = runs.order.size // count
        for i in range(runs.arrival.size):
            now = runs.arrival[i]
            able = 0
            for p in range(count):
                able += fits[i, p]
            first, second = 0, count
            if rule == TWO_CHOICES and able > 1:
                first = int(draws[i, 0] * able)
                second = int(draws[i, 1] * (able - 1))
                second += second >= first
            best, least, place = NOBODY, 0, -1
            for p in range(count):
                place += fits[i, p]
                if fits[i, p] == 0 or (
                    rule == TWO_CHOICES and able > 1 and place != first and place != second
                ):
                    continue
                replica = _replica(runs, phase, layout, p)
                if runs.state[p].now < now:
                    runs.state[p].until = min(now, runs.rules[p].horizon)
                    if loop == WAIT:
                        wait(replica)
                    elif loop == WAIT_RARE:
                        wait_rare(replica)
                    elif loop == NESTED:
                        nested(replica)
                    elif loop == NESTED_RARE:
                        nested_rare(replica)
                    elif ahead is not None:
                        if loop == CONTINUOUS_RARE:
                            continuous_rare(replica, _replica_ahead(ahead, layout, p), None)
                        else:
                            continuous(replica, _replica_ahead(ahead, layout, p), None)
                    elif loop == CONTINUOUS_RARE:
                        continuous_rare(replica, None, None)
                    else:
                        continuous(replica, None, None)
                seen = _seen(replica, now, rule)
                if best == NOBODY or seen < least:
                    best, least = p, seen
            runs.owner[i] = best
            if best != NOBODY:
                row = best * rows + runs.row[i]
                runs.order[best * places + runs.rows[row].tail] = i
                runs.rows[row].tail += 1
                runs.state[best].waiting += 1
                runs.state[best].queued += runs.prompt[i] + runs.rules[best].handed
                if ahead is not None:
                    _queue_by_length(
                        _replica(runs, phase, layout, best), _replica_ahead(ahead, layout, best), i
                    )

    return route


#: Every loop, and the router over replicas it runs.
LOOPS: tuple[Callable[..., None], ...] = (continuous, continuous_rare, wait, wait_rare, nested, nested_rare)
ROUTES = tuple(_routing(loop) for loop in range(len(LOOPS)))
