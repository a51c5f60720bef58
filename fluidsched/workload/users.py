"""Users who wait for their answers: what each will ask, and how long each thinks before.

A *closed* system has a fixed number U of users. User u asks for the m-th time

    A_{u,m} = F_{u,m-1} + z_{u,m},        F_{u,-1} = 0,

where F is when the answer before was complete and z how long the user thinks. F is known to a simulation only, so A
cannot be drawn; but z, and what is asked, can. A `UserSequences` holds these, drawn before any run and outside it, so
every policy meets the same users (common random numbers), and only the times at which they ask differ. At most one
request of a user is in the system at a time.

Every user has random streams of its own (times; which types; lengths of each type), derived from the seed, the user's
number and the type's *name*. So more users, more turns or a longer horizon only add requests, and another mean
stretches the same think times.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fluidsched._checks import check_count, check_real, check_scale
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.workload.arrivals import MAX_CV, MAX_USERS, MIN_CV
from fluidsched.workload.lengths import FloatArray, IntArray, read_only
from fluidsched.workload.model import Workload
from fluidsched.workload.path import MAX_REQUESTS, ArrivalPath, Seed, seed_sequence

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["UserSequences"]


@dataclass(frozen=True, eq=False, repr=False)
class UserSequences(Tabular):
    """What U users will ask, N requests in all, user by user and in each user's order.

    Drawn from a workload by `UserSequences.draw`, or given as columns; run by `simulate_closed_loop`.

    Parameters
    ----------
    user : int64[N]
        Who asks, 0 … U - 1, non-decreasing.
    think_s : float64[N]
        How long the user thinks before, s, at least 0: from its answer before, or from time 0.
    prompt_tokens, output_tokens : int64[N]
        Lengths, each at least 1 token.
    type : int64[N], optional
        Index into `type_names`.
    type_names : tuple of str
        Labels of types.
    users : int, optional
        U; one more than the last of `user` by default. Users of whom there is no request never ask.
    name : str
        Where the sequences come from.

    Raises
    ------
    InputError
        Naming the first value that is wrong.

    Examples
    --------
    Two users, of whom the first asks twice:

    >>> UserSequences([0, 0, 1], think_s=[0.0, 2.0, 1.0], prompt_tokens=[8, 8, 4], output_tokens=[5, 5, 9])
    UserSequences('users': 2 users, 3 requests, mean think time 1 s)
    """

    user: IntArray
    think_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    type: IntArray | None = None
    type_names: tuple[str, ...] = ()
    users: int | None = None
    name: str = "users"

    def __post_init__(self) -> None:
        user = np.asarray(self.user)
        if user.ndim != 1 or (user.dtype.kind not in "iu" and user.size):
            raise InputError(
                "user", f"an array of {user.dtype}, shape {user.shape}", "be whole numbers, one per request"
            )
        user = user.astype(np.int64)
        wrong = np.diff(user, prepend=0) < 0
        if wrong.any():
            i = int(np.argmax(wrong))
            raise InputError(
                f"user[{i}]",
                int(user[i]),
                "be at least 0 and not below the one before",
                "Sort the requests by user.",
            )
        count = int(user[-1]) + 1 if len(user) else 0
        count = check_count(
            "users", count if self.users is None else self.users, minimum=count, maximum=MAX_USERS
        )
        think = np.asarray(self.think_s)
        if think.shape != user.shape or (think.dtype.kind not in "iuf" and think.size):
            raise InputError(
                "think_s",
                f"an array of {think.dtype}, shape {think.shape}",
                f"be {len(user)} times, one per request",
            )
        think = think.astype(np.float64)
        bad = ~(np.isfinite(think) & (think >= 0.0))
        if bad.any():
            i = int(np.argmax(bad))
            raise InputError(f"think_s[{i}]", float(think[i]), "be finite and at least 0 s")
        # lengths and types are those of a path, and checked as such
        path = ArrivalPath(
            np.zeros(len(user)),
            self.prompt_tokens,
            self.output_tokens,
            self.type,
            self.type_names,
            name=self.name,
        )
        for field in ("prompt_tokens", "output_tokens", "type", "type_names"):
            object.__setattr__(self, field, getattr(path, field))
        object.__setattr__(self, "user", read_only(user))
        object.__setattr__(self, "think_s", read_only(think))
        object.__setattr__(self, "users", count)

    @classmethod
    def draw(
        cls,
        workload: Workload,
        users: int,
        *,
        think_mean: float,
        think_cv: float = 1.0,
        turns: int | None = None,
        horizon: float | None = None,
        seed: Seed = 0,
    ) -> UserSequences:
        """Draw sequences: types in the proportions of a workload's rates, lengths by their laws, gamma think times.

        Parameters
        ----------
        workload : Workload
            Its rates say how often a type is asked for among all, not how often per second: that is for the run to
            find. Its arrival processes are not used.
        users : int
            U, at least 1.
        think_mean : float
            Mean think time, s; 0: users ask again at once.
        think_cv : float
            Coefficient of variation of think times, 0 (constant) to 100; 1 is exponential.
        turns : int, optional
            Requests of every user, who then leaves.
        horizon : float, optional
            Instead of `turns`: as many as a user could send in so many seconds if answers took no time, so enough
            for any server. For a mean think time above 0.
        seed : int, SeedSequence or Generator
            The same integer or sequence gives the same sequences; a generator is advanced.

        Examples
        --------
        >>> import fluidsched as fs
        >>> workload = fs.Workload([fs.RequestType("chat", 3.0, 512, 128), fs.RequestType("code", 1.0, 2048, 32)])
        >>> UserSequences.draw(workload, users=40, think_mean=18.0, turns=10, seed=7)
        UserSequences('workload': 40 users, 400 requests, mean think time 17.43 s)
        """
        if not isinstance(workload, Workload):
            raise InputError("workload", workload, "be a Workload")
        users = check_count("users", users, minimum=1, maximum=MAX_USERS)
        think_mean = check_scale("think_mean", think_mean)
        think_cv = check_real("think_cv", think_cv, minimum=0.0, maximum=MAX_CV)
        if 0.0 < think_cv < MIN_CV:
            raise InputError("think_cv", think_cv, f"be 0, or at least {MIN_CV:g}")
        if (turns is None) == (horizon is None):
            raise InputError(
                "turns and horizon",
                "both" if turns is not None else "neither",
                "be one of the two",
                "Give either.",
            )
        _refuse_columns(workload)
        if horizon is not None:
            horizon = check_scale("horizon", horizon, zero=False)
            if think_mean == 0.0:
                raise InputError(
                    "think_mean",
                    0.0,
                    "be above 0 s with a horizon",
                    "Give turns: users who do not think never stop.",
                )
            expected = users * (horizon / think_mean + 1.0)
        else:
            assert turns is not None
            turns = check_count("turns", turns, minimum=1, maximum=MAX_REQUESTS)
            expected = float(users) * turns
        if expected > MAX_REQUESTS:
            raise InputError(
                "users", users, f"ask at most {MAX_REQUESTS:,} requests; these ask about {expected:,.0f}"
            )
        shares = np.cumsum(workload.arrival_rate / workload.total_arrival_rate)
        keys = [
            int.from_bytes(hashlib.sha256(t.name.encode()).digest()[:8], "little") for t in workload.types
        ]
        root = seed_sequence(seed)

        def stream(*key: int) -> np.random.Generator:
            return np.random.default_rng(
                np.random.SeedSequence(
                    root.entropy, spawn_key=(*root.spawn_key, *key), pool_size=root.pool_size
                )
            )

        counts, thinks, types, prompts, outputs = [], [], [], [], []
        for u in range(users):
            think = _think_times(stream(u, 0), think_mean, think_cv, turns, horizon)
            of_turn = np.minimum(
                np.searchsorted(shares, stream(u, 1).random(len(think)), side="right"), len(keys) - 1
            )
            prompt, output = np.empty(len(think), dtype=np.int64), np.empty(len(think), dtype=np.int64)
            for j in np.unique(of_turn).tolist():
                mine = of_turn == j
                prompt[mine], output[mine] = workload.types[j].law.sample(
                    stream(u, 2, keys[j]), int(mine.sum())
                )
            counts.append(len(think))
            thinks.append(think)
            types.append(of_turn)
            prompts.append(prompt)
            outputs.append(output)
        return cls(
            np.repeat(np.arange(users), counts),
            np.concatenate(thinks),
            np.concatenate(prompts),
            np.concatenate(outputs),
            np.concatenate(types),
            workload.type_names,
            users,
            workload.name,
        )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def turn(self) -> IntArray:
        """How many requests of the same user come before, int64[N]."""
        return np.arange(len(self)) - np.searchsorted(self.user, self.user)

    def open_path(self, response_s: float = 0.0) -> tuple[ArrivalPath, IntArray]:
        """The requests as an open path, as if every answer took so long; and their indices in these sequences.

        A path is what fluid programs' tables, sweeps and `simulate` take. With `response_s` 0 no request comes later
        than in this path, whatever serves them.

        Examples
        --------
        >>> asked = UserSequences([0, 0, 1], [0.0, 2.0, 1.0], [8, 8, 4], [5, 5, 9])
        >>> path, index = asked.open_path(response_s=0.5)
        >>> path.arrival_s, index
        (array([0. , 1. , 2.5]), array([0, 2, 1]))
        """
        response_s = check_scale("response_s", response_s)
        gaps = self.think_s + response_s * (self.turn > 0)
        arrival = np.concatenate(
            [np.cumsum(part) for part in np.split(gaps, np.flatnonzero(np.diff(self.user)) + 1)] or [gaps]
        )
        index = np.argsort(arrival, kind="stable")
        path = self.as_columns()
        return dataclasses.replace(path.selected(index), arrival_s=arrival[index]), index

    def as_columns(self) -> ArrivalPath:
        """All requests in the order of these sequences, as columns of a path; its times are all the longest user's sum
        of think times, s, and mean nothing else."""
        sums = np.bincount(self.user, self.think_s)
        return ArrivalPath(
            np.full(len(self), sums.max(initial=0.0)),
            self.prompt_tokens,
            self.output_tokens,
            self.type,
            self.type_names,
            name=self.name,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per request: ``user turn think_s prompt_tokens output_tokens``, and ``type`` where there are any."""
        import pandas as pd

        names = ("user", "turn", "think_s", "prompt_tokens", "output_tokens")
        frame = pd.DataFrame({name: getattr(self, name) for name in names})
        if self.type is not None:
            frame["type"] = np.asarray(self.type_names, dtype=object)[self.type]
        return frame

    def __repr__(self) -> str:
        think = f", mean think time {self.think_s.mean():.4g} s" if len(self) else ""
        return f"UserSequences({self.name!r}: {self.users:,} users, {len(self):,} requests{think})"


def _think_times(
    rng: np.random.Generator, mean: float, cv: float, turns: int | None, horizon: float | None
) -> FloatArray:
    """`turns` gamma think times, or those whose sum is within the horizon."""
    size = turns
    if size is None:
        assert horizon is not None
        size = max(8, math.ceil(1.2 * horizon / mean))

    def more() -> FloatArray:
        if cv == 0.0:
            return np.full(size, mean)
        shape = cv**-2
        return rng.standard_gamma(shape, size) * (mean / shape)

    think = more()
    if horizon is None:
        return think
    while (ends := np.cumsum(think))[-1] <= horizon:
        think = np.concatenate([think, more()])
    return think[: int(np.searchsorted(ends, horizon, side="right"))]


def _refuse_columns(workload: Workload) -> None:
    """Sequences hold lengths and types, nothing else of a request."""
    remedy = "Sequences of users hold types, lengths and think times only."
    if workload.total_arrival_rate == 0.0:
        raise InputError(
            "arrival_rate", "0 for every type", "have a positive sum", "It says what share a type has."
        )
    if workload.predictions is not None:
        raise InputError("workload.predictions", workload.predictions, "be None", remedy)
    for member in workload.types:
        for argument in ("patience", "abort_after"):
            if getattr(member, argument) is not None:
                raise InputError(
                    f"{argument} of type {member.name!r}", getattr(member, argument), "be None", remedy
                )
        if member.cached_prefix_fraction:
            raise InputError(
                f"cached_prefix_fraction of type {member.name!r}",
                member.cached_prefix_fraction,
                "be 0",
                remedy,
            )
