"""How long one iteration lasts.

An iteration is one forward pass over a batch. The batch prefills n_pf prompt tokens and decodes n_dec
requests (one token each); those decodes read k_dec tokens of KV, and the prefill does q_pf units of
attention work: a chunk of c tokens of a prompt with d tokens already computed counts c·(d + c/2), which
adds up to p²/2 for a prompt of p tokens however it is chunked. The time is convex and piecewise affine in
these four numbers,

    T = max over pieces i of  c0_i + c_pf,i·n_pf + c_dec,i·n_dec + c_kv,i·k_dec + c_attn,i·q_pf    [s].

Token coefficients are non-negative, so T grows with the batch. A base c0_i may be negative (the second
piece of a knee often is), as long as the empty batch takes positive time, max_i c0_i > 0. One piece is the
*affine* model. The *paper's* model (Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320) is d0 + d1·(KV tokens of
every request in the batch), the row (d0, d1, 0, d1, 0). The *two-piece* model has a knee where the matrix
products turn compute-bound: beyond `knee_tokens` tokens in the batch every further token costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_fields, check_real, check_scale
from fluidsched.errors import InputError

__all__ = ["COEFFICIENTS", "BatchFunction", "BatchSummary", "IterationTime"]

#: Columns of `IterationTime.coefficients`, in order: s, s/token, s/token, s/token, s/token².
COEFFICIENTS = ("base", "per_prefill_token", "per_decode_token", "per_kv_token", "per_prefill_attention")

SCHEMA = "fluidsched.iteration-time/1"


class BatchSummary(NamedTuple):
    """What one iteration does, as handed to the function of `IterationTime.function`.

    Parameters
    ----------
    prefill_tokens : int
        Prompt tokens computed in the iteration.
    decode_tokens : int
        Decoding requests, one token each.
    kv_tokens : int
        KV tokens those decodes read: p + k − 1 for a request in its iteration k.
    prefill_attention : float
        Σ over prefill chunks of chunk·(tokens of the prompt already computed + chunk/2), tokens².
    prefill_chunks : tuple of int
        The length of every prefill chunk in the iteration, tokens.
    """

    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    prefill_attention: float
    prefill_chunks: tuple[int, ...] = ()


BatchFunction = Callable[[BatchSummary], float]


class _Function:
    """`IterationTime.function(f)` constructs; `iteration_time.function` is that f, or None for pieces."""

    @overload
    def __get__(
        self, instance: None, owner: type[IterationTime]
    ) -> Callable[[BatchFunction], IterationTime]: ...
    @overload
    def __get__(self, instance: IterationTime, owner: type[IterationTime]) -> BatchFunction | None: ...
    def __get__(
        self, instance: IterationTime | None, owner: type[IterationTime]
    ) -> Callable[[BatchFunction], IterationTime] | BatchFunction | None:
        if instance is not None:
            return instance._function
        return lambda function: owner(None, function)


@dataclass(frozen=True, eq=False, repr=False)
class IterationTime:
    """Duration of an iteration as a function of its batch; see the module's mathematics.

    Construct by `affine`, `paper`, `two_piece`, `pieces` or `function`.

    Attributes
    ----------
    coefficients : ndarray of shape (I, 5) or None
        One row (base, per_prefill_token, per_decode_token, per_kv_token, per_prefill_attention) per affine
        piece, in s, s/token, s/token, s/token and s/token². Read-only. None for `IterationTime.function`.
    function : callable or None
        For `IterationTime.function(f)`: f(batch summary) -> s, used by the reference engine only.

    Raises
    ------
    InputError
        If a coefficient is not finite, a token coefficient is negative, or the empty batch takes no time.

    Examples
    --------
    >>> iteration_time = IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7)
    >>> float(iteration_time(512, 20, 10_000))
    0.0396
    >>> iteration_time.empty
    0.01
    """

    coefficients: NDArray[np.float64] | None
    _function: BatchFunction | None = None

    function = _Function()

    def __post_init__(self) -> None:
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", _checked(self.coefficients))
            return
        if not callable(self._function):
            raise InputError("function", self._function, "be callable: f(batch summary) -> seconds")
        check_real("function(empty batch)", self._function(BatchSummary(0, 0, 0, 0.0)), above=0.0)

    @classmethod
    def affine(
        cls,
        base: float,
        per_prefill_token: float,
        per_decode_token: float,
        per_kv_token: float,
        per_prefill_attention: float = 0.0,
    ) -> IterationTime:
        """One affine piece; s, s/token (three times), s/token²."""
        return cls(
            np.array(
                [[base, per_prefill_token, per_decode_token, per_kv_token, per_prefill_attention]],
                dtype=object,
            )
        )

    @classmethod
    def paper(cls, d0: float, d1: float) -> IterationTime:
        """The paper's model d0 + d1·(KV tokens of every request in the batch); s and s/token.

        Examples
        --------
        >>> IterationTime.paper(d0=0.01, d1=3.3e-7).coefficients.tolist()
        [[0.01, 3.3e-07, 0.0, 3.3e-07, 0.0]]
        """
        return cls.affine(d0, d1, 0.0, d1, 0.0)

    @classmethod
    def two_piece(
        cls,
        base: float,
        per_token: float,
        knee_tokens: float,
        per_token_beyond: float,
        per_kv_token: float,
        per_prefill_attention: float = 0.0,
    ) -> IterationTime:
        """A knee in the batch's tokens n: base + per_token·n + per_token_beyond·max(0, n − knee_tokens) + …

        Parameters
        ----------
        base : float
            Time of the empty batch, s.
        per_token : float
            Time per prefilled or decoded token, s/token.
        knee_tokens : float
            Tokens in the iteration where the second slope begins.
        per_token_beyond : float
            What each token beyond the knee costs more, s/token.
        per_kv_token : float
            Time per KV token read by decodes, s/token.
        per_prefill_attention : float
            Time per unit of prefill attention work, s/token².

        Examples
        --------
        >>> two = IterationTime.two_piece(0.01, 5e-5, 400, 3e-5, 3e-7)
        >>> round(float(two(300, 0, 0)), 6), round(float(two(500, 0, 0)), 6)
        (0.025, 0.038)
        """
        base = check_real("base", base)
        per_token = check_scale("per_token", per_token)
        knee_tokens = check_scale("knee_tokens", knee_tokens)
        per_token_beyond = check_scale("per_token_beyond", per_token_beyond)
        steep = per_token + per_token_beyond
        rows = [
            (base, per_token, per_token, per_kv_token, per_prefill_attention),
            (base - per_token_beyond * knee_tokens, steep, steep, per_kv_token, per_prefill_attention),
        ]
        return cls(np.array(rows, dtype=object))

    @classmethod
    def pieces(cls, pieces: Iterable[IterationTime | Sequence[float]]) -> IterationTime:
        """The largest of several piecewise-affine models.

        Unlike in `affine`, a piece given as a row of five numbers may have a negative base.

        Examples
        --------
        >>> both = IterationTime.pieces([IterationTime.paper(0.01, 3e-7), (-0.02, 8e-5, 8e-5, 3e-7, 0.0)])
        >>> both.coefficients.shape
        (2, 5)
        """
        rows: list[Any] = []
        for position, piece in enumerate(pieces):
            if isinstance(piece, IterationTime):
                if piece.coefficients is None:
                    raise InputError(
                        f"pieces[{position}]", "a function", "be affine or a row of five numbers"
                    )
                rows.extend(piece.coefficients.tolist())
            else:
                rows.append(list(piece))
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                "pieces", f"rows of lengths {[len(row) for row in rows]}", "be rows of five numbers"
            )
        return cls(np.array(rows, dtype=object))

    def __call__(
        self,
        prefill_tokens: ArrayLike,
        decode_tokens: ArrayLike,
        kv_tokens: ArrayLike,
        prefill_attention: ArrayLike = 0.0,
    ) -> NDArray[np.float64]:
        """Duration in seconds of batches with these counts; the four arguments broadcast.

        Parameters
        ----------
        prefill_tokens, decode_tokens, kv_tokens : array_like
            Tokens, as in the module's mathematics.
        prefill_attention : array_like
            Tokens².

        Raises
        ------
        InputError
            For `IterationTime.function`, which needs a whole batch summary: call `.function(summary)`.
        """
        coefficients = self.require_coefficients("evaluating it on token counts")
        counts = np.broadcast_arrays(1.0, prefill_tokens, decode_tokens, kv_tokens, prefill_attention)
        return np.asarray(np.max(np.stack(counts, axis=-1) @ coefficients.T, axis=-1), dtype=np.float64)

    @property
    def empty(self) -> float:
        """T of the empty batch, max over pieces of the base, s."""
        if self.coefficients is None:
            assert self._function is not None
            return float(self._function(BatchSummary(0, 0, 0, 0.0)))
        return float(self.coefficients[:, 0].max())

    def require_coefficients(self, purpose: str) -> NDArray[np.float64]:
        """Return `coefficients`, or raise `InputError` saying that `purpose` needs affine pieces."""
        if self.coefficients is None:
            raise InputError(
                "iteration_time",
                "a function",
                f"be piecewise affine for {purpose}",
                "Only the reference engine follows a function; fit pieces to it for everything else.",
            )
        return self.coefficients

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IterationTime):
            return NotImplemented
        if self.coefficients is None or other.coefficients is None:
            return self._function is other._function and self.coefficients is other.coefficients
        return np.array_equal(self.coefficients, other.coefficients)

    def __hash__(self) -> int:
        return hash(self._function if self.coefficients is None else self.coefficients.tobytes())

    def __repr__(self) -> str:
        if self.coefficients is None:
            return f"IterationTime.function({self._function!r})"
        rows = [
            ", ".join(f"{name}={value:.4g}" for name, value in zip(COEFFICIENTS, row, strict=True))
            for row in self.coefficients
        ]
        shown = rows[0] if len(rows) == 1 else "max of\n    " + "\n    ".join(rows)
        return f"IterationTime({shown})  [s, s/token, s/token²]"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the schema and one mapping of named coefficients per piece."""
        coefficients = self.require_coefficients("writing it to a file")
        return {
            "schema": SCHEMA,
            "pieces": [dict(zip(COEFFICIENTS, row, strict=True)) for row in coefficients.tolist()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], argument: str = "iteration_time") -> IterationTime:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        (pieces,) = check_fields(argument, data, SCHEMA, ("pieces",))
        if not isinstance(pieces, list) or not pieces:
            raise InputError(f"{argument}.pieces", pieces, "be a non-empty list of pieces")
        rows = []
        for position, piece in enumerate(pieces):
            where = f"{argument}.pieces[{position}]"
            values = check_fields(where, piece, None, COEFFICIENTS)
            rows.append([check_real(f"{where}.{n}", v) for n, v in zip(COEFFICIENTS, values, strict=True)])
        return cls(np.array(rows, dtype=object))


def _checked(coefficients: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(coefficients, dtype=object)
    if given.ndim != 2 or given.shape[0] == 0 or given.shape[1] != len(COEFFICIENTS):
        raise InputError("coefficients", f"shape {given.shape}", "have shape (I, 5) with at least one piece")
    array = np.empty(given.shape)
    for (piece, column), value in np.ndenumerate(given):
        name = COEFFICIENTS[column] if len(given) == 1 else f"{COEFFICIENTS[column]} of piece {piece}"
        negative = column == 0 and check_real(name, value) < 0.0
        array[piece, column] = -check_scale(name, -value) if negative else check_scale(name, value)
    if array[:, 0].max() <= 0.0:
        raise InputError(
            "base",
            float(array[:, 0].max()),
            "be positive in at least one piece, so that the empty batch takes time",
        )
    array.setflags(write=False)
    return array
