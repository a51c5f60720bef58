"""TOML files of people: read, and errors that name the line.

`tomllib` keeps no positions. But the text up to the end of a statement is a document too, and the first such beginning
that holds a key ends with the statement that set it; so the line of a key is found by reading beginnings of the text,
with no grammar of our own. Specs are short, and this happens only on the way to an error.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fluidsched import _files
from fluidsched.errors import InputError

__all__ = ["locating", "read_toml"]

Path = tuple[str | int, ...]

_MOST_LINES = 1_000
"""A longer file is not searched for the line of a key: the time grows with the square of its lines."""


def read_toml(argument: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file; what is not TOML is an `InputError` naming file and line."""
    text = _files.read_text(argument, path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        if found is None:  # "(at end of document)"
            line = len(text.splitlines())
            raise InputError(f"{path}, line {line}", str(error), "be valid TOML") from None
        what, line, column = found[1], int(found[2]), found[3]
        shown = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else ""
        raise InputError(
            f"{path}, line {line}, column {column}", f"{shown} ({what.lower()})", "be valid TOML"
        ) from None
    except RecursionError:
        raise InputError(
            str(path), "TOML nested too deeply", "be a TOML file that fluidsched knows"
        ) from None
    except ValueError:  # Python's limit on the digits of an integer, the only other complaint
        raise InputError(
            str(path), "a number of thousands of digits", "hold numbers of ordinary size"
        ) from None


@contextmanager
def locating(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about what a spec file says name the file and, of TOML, the line of the key at fault."""
    try:
        yield
    except InputError as error:
        place = str(path)
        if place.lower().endswith(".toml"):
            text = _files.read_text(place, path)
            line = _line(text, str(error.argument), error.received)
            place += "" if line is None else f", line {line}"
        raise InputError(f"{place}: {error.argument}", error.received, error.required, error.remedy) from None


def _line(text: str, argument: str, received: object) -> int | None:
    """Line of the statement that sets the key an error is about, or what comes nearest to it."""
    if text.count("\n") > _MOST_LINES:
        return None
    document = tomllib.loads(text)
    words = re.findall(r"[\w-]+|\[\d+\]", argument.partition(" of ")[0])
    key = _nearest(document, [int(word[1:-1]) if word[0] == "[" else word for word in words], received)
    if not key:
        return None
    lines, start = text.splitlines(keepends=True), 0
    for end in range(1, len(lines) + 1):
        try:
            beginning = tomllib.loads("".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # within a statement
        if _holds(beginning, key):
            within = (
                k for k in range(start, end) if lines[k].strip() and not lines[k].lstrip().startswith("#")
            )
            return next(within, end - 1) + 1
        start = end
    return None


def _nearest(document: Any, words: Path | list[str | int], received: object) -> Path:
    """The longest beginning of a key that the document holds; a lone last word is looked for anywhere."""
    for skipped in range(min(2, len(words))):  # errors may name the object ("server.") before the key
        node: Any = document
        key: list[str | int] = []
        rest = list(words[skipped:])
        while rest:
            joined = ".".join(map(str, rest))
            if isinstance(node, Mapping) and joined in node:  # a quoted key with dots in it
                return (*key, joined)
            word = rest.pop(0)
            child = _child(node, word)
            if child is None:
                break
            node = child[0]
            key.append(word)
        if key:
            return tuple(key)
    ends = [key for key, _ in _leaves(document) if words and key[-1] == words[-1]]
    same = [key for key, value in _leaves(document) if key in ends and value == received]
    return (same or ends or [()])[0]


def _leaves(node: Any, key: Path = ()) -> Iterator[tuple[Path, Any]]:
    children: Any = ()
    if isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    for name, child in children:
        yield (*key, name), child
        yield from _leaves(child, (*key, name))


def _child(node: Any, word: str | int) -> tuple[Any] | None:
    """What lies under a key or index, in a tuple; None where nothing does."""
    if isinstance(node, Mapping) and word in node:
        return (node[word],)
    if isinstance(node, list) and isinstance(word, int) and word < len(node):
        return (node[word],)
    return None


def _holds(node: Any, key: Path) -> bool:
    for word in key:
        child = _child(node, word)
        if child is None:
            return False
        node = child[0]
    return True
