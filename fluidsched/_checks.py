"""Checks of single arguments, shared by every public constructor.

Each returns the value in its canonical type or raises `InputError` with the argument's name.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fluidsched.errors import InputError

__all__ = [
    "check_choice",
    "check_count",
    "check_fields",
    "check_keys",
    "check_real",
    "check_scale",
    "check_text",
]


def check_real(
    argument: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
    allow_inf: bool = False,
    remedy: str = "",
) -> float:
    """Return `value` as a float within [minimum, maximum], > above and < below; NaN never passes."""
    plain = type(value) is float and math.isfinite(value)  # most of all calls
    if plain and minimum <= value <= maximum and above < value < below:
        return float(value)
    required = "be a finite number" if not allow_inf else "be a number (not NaN)"
    if above > -math.inf:
        required += f" above {above:g}"
    if minimum > -math.inf:
        required += f" of at least {minimum:g}"
    if maximum < math.inf:
        required += f", at most {maximum:g}"
    if below < math.inf:
        required += f", below {below:g}"
    number = _as_float(argument, value, required, remedy)
    if (
        math.isnan(number)
        or (math.isinf(number) and not allow_inf)
        or number < minimum
        or number <= above
        or number > maximum
        or (below < math.inf and number >= below)
    ):
        raise InputError(argument, value, required, remedy)
    return number


SMALLEST, LARGEST = 1e-50, 1e50
"""Magnitudes of rates, times and capacities: their products and quotients then stay within floating point."""


LARGEST_COUNT = 2**53
"""Largest limit on requests, tokens or iterations: floats count exactly up to it, compiled loops do not overflow."""


def check_scale(
    argument: str, value: Any, *, zero: bool = True, allow_inf: bool = False, remedy: str = ""
) -> float:
    """Return `value` as a float of at least 0 (above 0 without `zero`) whose magnitude arithmetic can carry."""
    number = check_real(
        argument,
        value,
        minimum=0.0 if zero else -math.inf,
        above=-math.inf if zero else 0.0,
        allow_inf=allow_inf,
        remedy=remedy,
    )
    if number > 0.0 and not (SMALLEST <= number <= LARGEST or math.isinf(number)):
        required = f"lie between {SMALLEST:g} and {LARGEST:g}" + (", or be 0" if zero else "")
        raise InputError(argument, value, required, "Check its unit.")
    return number


def check_text(argument: str, value: Any) -> str:
    """Return `value` if it is a non-empty string that can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(argument, value, "be a non-empty string")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(argument, ascii(value), "be valid Unicode, without single surrogates")
    return value


def check_count(
    argument: str, value: Any, *, minimum: int = 0, maximum: int | None = None, remedy: str = ""
) -> int:
    """Return `value` as an int within [minimum, maximum]; integral floats are accepted, bools are not."""
    if type(value) is int and minimum <= value <= (LARGEST_COUNT if maximum is None else maximum):
        return int(value)  # most of all calls
    required = f"be a whole number of at least {minimum:,}"
    if maximum is not None:
        required += f", at most {maximum:,}"
    number = _as_float(argument, value, required, remedy)
    if not math.isfinite(number) or number != math.floor(number):
        raise InputError(argument, value, required, remedy)
    count: int = int(value)
    if count < minimum or (maximum is not None and count > maximum):
        raise InputError(argument, value, required, remedy)
    return count


def _as_float(argument: str, value: Any, required: str, remedy: str) -> float:
    """The value as a float; booleans, what is no number and integers beyond all floats are refused."""
    if isinstance(
        value, float
    ):  # the common case, NumPy's included; the abstract class below takes far longer
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(argument, value, required, remedy)
    try:
        return float(value)
    except OverflowError:
        raise InputError(argument, "an integer of more than 308 digits", required, remedy) from None


def check_choice(argument: str, value: Any, choices: Sequence[str], remedy: str = "") -> str:
    """Return `value` if it is one of `choices`; the error suggests the nearest ones."""
    if isinstance(value, str) and value in choices:
        return value
    near = get_close_matches(str(value), choices, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise InputError(
        argument,
        value,
        "be one of " + ", ".join(repr(c) for c in choices),
        " ".join(filter(None, [hint, remedy])),
    )


def check_fields(argument: str, data: Any, schema: str | None, names: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of exactly the fields `names` of a mapping read from JSON, in that order.

    With `schema` the mapping must also hold "schema" with that value. A missing or unknown field, another
    schema, or something that is no mapping is an `InputError` naming it.
    """
    fields = check_keys(argument, data, schema, names)
    return tuple(fields[name] for name in names)


def check_keys(
    argument: str, data: Any, schema: str | None, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a mapping read from JSON as a dict, with all `required` fields and none beyond the `optional`.

    As `check_fields`, for formats with fields that may be left out; "schema" is not part of the result.
    """
    if not isinstance(data, Mapping):
        raise InputError(argument, data, "be a mapping (a JSON object)")
    expected = list(required) if schema is None else ["schema", *required]
    if schema is not None and data.get("schema") != schema:
        raise InputError(f"{argument}.schema", data.get("schema"), f"be {schema!r}")
    known = [*expected, *optional]
    for name in data:  # before what is missing: a misspelt key is the reason why one is
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.6)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            raise InputError(f"{argument}.{name}", data[name], "be left out: no such field is known", remedy)
    missing = [name for name in expected if name not in data]
    if missing:
        raise InputError(f"{argument}.{missing[0]}", "nothing", "be given")
    return {name: value for name, value in data.items() if schema is None or name != "schema"}
