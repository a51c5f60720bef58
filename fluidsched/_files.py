"""Files written whole or not at all, strict JSON, and fingerprints of inputs.

A file appears under its name only when complete: the text goes to a temporary file in the same directory,
is flushed to the disk, and is renamed over the target. JSON is strict in both directions: no NaN or infinity
goes out (`to_jsonable` spells infinity as the string "inf"), none comes in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluidsched.errors import InputError

__all__ = [
    "dumps",
    "fingerprint",
    "loads",
    "make_directory",
    "read_text",
    "to_jsonable",
    "whole_file",
    "write_whole",
]


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on any exception removed.

    A path that cannot be written is an `InputError` naming it; what goes wrong inside is left as it is.
    """
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise InputError(
            str(target), "a missing directory", "lie in an existing directory", "Create it first."
        )
    with _writing(target):  # the end of a name may take all its 255 bytes
        name_part = os.fsdecode(os.fsencode(target.name)[:64])
        handle, name = tempfile.mkstemp(prefix=f".{name_part}.", suffix=target.suffix[:16], dir=target.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with _writing(target):
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            str(target), error.strerror or str(error), "be a file that can be written"
        ) from error
    except ValueError as error:  # a path with a null character
        raise InputError(repr(str(target)), str(error), "be a file that can be written") from error


def make_directory(argument: str, path: str | os.PathLike[str], *, parents: bool = False) -> Path:
    """Make the directory `path` where it is missing; one that cannot be made is an `InputError`."""
    place = Path(path)
    try:
        place.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        required = "name a directory, or one that can be made"
        raise InputError(argument, f"{place} ({error.strerror or error})", required) from None
    except ValueError as error:  # a null character
        raise InputError(argument, f"{str(place)!r} ({error})", "name a directory") from None
    return place


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path` whole or not at all, and return the path."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with whole_file(path) as temporary, _writing(Path(path)):
        temporary.write_bytes(data)
    return Path(path)


def read_text(argument: str, path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file; a missing, unreadable or undecodable file is an `InputError` naming it."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(argument, str(path), "name an existing file", "Check the path.") from None
    except OSError as error:
        raise InputError(argument, f"{path} ({error.strerror})", "name a readable file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}", "bytes that are not UTF-8", "be UTF-8 text") from None
    except ValueError as error:  # a null character
        raise InputError(argument, f"{str(path)!r} ({error})", "name an existing file") from None


_PLAIN = (str, int, bool, type(None))


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses, NumPy arrays and scalars, mappings and sequences into plain JSON values.

    Infinity becomes the string "inf" (or "-inf") and NaN becomes null, so that the text is valid JSON.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biu" or (value.dtype.kind == "f" and np.isfinite(value).all()):
            return value.tolist()
        return [to_jsonable(v) for v in value.tolist()]
    if isinstance(value, np.generic):
        return to_jsonable(value.item())
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return value
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(v) for v in value]
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def dumps(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON text of `to_jsonable(value)`, keys in the order given, with a final newline."""
    return json.dumps(to_jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def loads(argument: str, text: str, *, strict: bool = True) -> Any:
    """Parse JSON; what is wrong with it is an `InputError` with its place.

    Strict JSON, our own, holds no NaN, no infinities and no key twice; other programs write such things.
    """

    def refuse_constant(word: str) -> Any:
        raise InputError(argument, word, "hold finite numbers only", 'Write infinity as the string "inf".')

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in pairs:
            if key in result:
                raise InputError(argument, f"key {key!r} twice", "give each key once")
            result[key] = item
        return result

    try:
        if not strict:
            return json.loads(text)
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)
        if _SURROGATE.search(text):  # one that has lost its other half cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or not text[error.pos :].strip()
        what = f"a file that ends too early ({error.msg})" if cut else error.msg
        remedy = "Is the file whole?" if cut else ""
        raise InputError(f"{argument}, line {error.lineno}", what, "be valid JSON", remedy) from None
    except RecursionError:
        raise InputError(argument, "JSON nested too deeply", "be a JSON file that fluidsched knows") from None
    except InputError:
        raise
    except UnicodeEncodeError:
        raise InputError(argument, "a single surrogate escape", "hold valid Unicode") from None
    except ValueError:  # Python's limit on the digits of an integer, its only other complaint
        raise InputError(
            argument, "a number of thousands of digits", "hold numbers of ordinary size"
        ) from None


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: equal inputs, equal fingerprints, on any machine.

    Examples
    --------
    >>> fingerprint({"b": 1, "a": 2.0}) == fingerprint({"a": 2.0, "b": 1})
    True
    """
    if isinstance(value, bytes):
        data = value
    else:
        text = json.dumps(to_jsonable(value), sort_keys=True, allow_nan=False, separators=(",", ":"))
        data = text.encode()
    return "sha256:" + hashlib.sha256(data).hexdigest()
