"""Objects as recipes: the name of the function that makes them and its arguments, as plain data.

``{"law": "geometric", "mean": 200}`` stands for ``lengths.geometric(mean=200)``. Length laws, arrival processes
and predictions are written to JSON this way; their constructors do the checking, whoever calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fluidsched._checks import check_choice, check_keys
from fluidsched.errors import InputError

__all__ = ["Makers", "read_recipe"]

Made = TypeVar("Made")

Makers = Mapping[str, tuple[Callable[..., Made], tuple[str, ...], tuple[str, ...]]]
"""Name -> function, its required arguments, its optional ones."""


def read_recipe(
    argument: str,
    data: object,
    key: str,
    makers: Makers[Made],
    readers: Mapping[str, Callable[[str, Any], Any]] | None = None,
) -> Made:
    """Make the object that `data` describes; errors name the field, e.g. "types[2].output_tokens.mean".

    Parameters
    ----------
    argument : str
        Where `data` stands.
    data : mapping
        The recipe; `key` holds the name.
    key : str
        "law", "process", ...
    makers : mapping
        The functions by name.
    readers : mapping, optional
        Arguments that are recipes themselves -> how to read them, called with place and value.
    """
    if not isinstance(data, Mapping):
        raise InputError(argument, data, f'be an object with the field "{key}"')
    name = check_choice(f"{argument}.{key}", data.get(key), tuple(makers))
    maker, required, optional = makers[name]
    arguments = check_keys(argument, data, None, (key, *required), optional)
    del arguments[key]
    for inner, read in (readers or {}).items():
        if inner in arguments:
            arguments[inner] = read(f"{argument}.{inner}", arguments[inner])
    try:
        return maker(**arguments)
    except InputError as error:
        raise InputError(
            f"{argument}.{error.argument}", error.received, error.required, error.remedy
        ) from None
