"""The memory of a sweep: an append-only file that survives being killed at any byte.

One line is one record,

    <CRC-32 of the rest, 8 hex digits> <kind> <key> <JSON>

with kinds ``header`` (once, first: the spec's fingerprint), ``done`` and ``failed`` (the key is the cell;
of two records the later counts), and ``claim`` (the key is first:stop of a run of cells that a process has
taken). Finished cells are flushed to the disk before anyone is told of them. A line that is cut off,
whose checksum fails, or that says what no sweep writes, is no record; the cells it spoke of run again.
Since nobody relies on the order of the records, the journal differs from run to run while the result does not.

Processes on one directory share the cells through the same file: each appends under an exclusive `flock` on
it, after reading what the others appended. A process lives as long as the `flock` on its own
``member-*.lock`` is held, which the kernel ends with the process, however it ends; claims of the dead are
void.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import uuid
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluidsched.errors import InputError, SimulationError

__all__ = ["Journal", "record"]

FREE, CLAIMED, DONE, FAILED = range(4)
ENDED = {b"done": DONE, b"failed": FAILED}

_BODY = re.compile(rb"(header|claim|done|failed) (\d{1,9}(?::\d{1,9})?) (.*)", re.DOTALL)
_PLAIN = frozenset((float, str, bool, type(None)))  # of any value
_NAME = re.compile(r"[\w.-]{1,200}")

_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def record(kind: str, key: int | str, payload: str) -> bytes:
    """One line of the journal.

    Examples
    --------
    >>> record("done", 3, '{"x": 1.5}')
    b'9817b1c9 done 3 {"x": 1.5}\\n'
    """
    body = f"{kind} {key} {payload}".encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Kind, key and payload of a whole and unharmed line, or None."""
    checksum, _, body = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
        return None
    match = _BODY.fullmatch(body)
    return None if match is None else (match[1], match[2], match[3])


def is_plain(value: Any) -> bool:
    """Whether a value can stand in the table: a number, whole ones of 64 bits at most, a string or None."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (float, str))


def are_plain(values: Collection[Any]) -> bool:
    """Whether all of them are; quicker than one by one where whole numbers are none of them."""
    return _PLAIN.issuperset(map(type, values)) or all(map(is_plain, values))


class Journal:
    """The journal of the directory, opened to share its cells; a context manager.

    Parameters
    ----------
    directory : Path
        An existing directory.
    header : dict
        Plain values that a journal made by the same sweep has too. `header["fingerprint"]` decides.
    cells : int
        Number of cells.
    join : bool
        Whether to share the work with processes that are at it already; else their presence is an error.
    retry_failed : bool
        Whether cells that failed before now are to run again.

    Raises
    ------
    InputError
        If the directory is in use, or holds the journal of another sweep.
    SimulationError
        From any method that writes, if the disk does not take it. The journal stays valid.
    """

    def __init__(
        self, directory: Path, header: dict[str, Any], cells: int, *, join: bool, retry_failed: bool
    ) -> None:
        self.path = directory / "journal.txt"
        self.retry_failed = retry_failed
        self._header = header
        self._state = bytearray(cells)
        self._cursor = 0
        self._offset = 0  # what lies before it has been read
        self._claims: dict[str, list[range]] = {}
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())[:100]
        self._name = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._member = -1
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_journals.add(self)
        try:
            with self._locked(sync=False):
                living = [name for name in self._members() if self._is_alive(name)]
                if living and not join:
                    raise InputError(
                        str(directory),
                        f"in use by {' and '.join(living)} (host-process-number)",
                        "not be in use by another sweep",
                        "Wait for it, or join it (join=True, --join) to share its cells.",
                    )
                self._check_header()
                self._sync(opening=True)
                self._member = os.open(self._member_path(self._name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
                fcntl.flock(self._member, fcntl.LOCK_EX)
                self._free_the_dead()
        except BaseException:
            self.close()
            raise

    # -- who is there -----------------------------------------------------------------------------------

    def _member_path(self, name: str) -> Path:
        return self.path.parent / f"member-{name}.lock"

    def _members(self) -> list[str]:
        paths = sorted(self.path.parent.glob("member-*.lock"))
        return [path.stem.removeprefix("member-") for path in paths]

    def _is_alive(self, name: str) -> bool:
        """Whether the process holds its lock. The file of one that does not is removed. Needs the lock."""
        try:
            member = os.open(self._member_path(name), os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(member)
        self._member_path(name).unlink(missing_ok=True)
        return False

    def _free_the_dead(self) -> None:
        for name in list(self._claims):
            if name != self._name and not self._is_alive(name):
                for cell in (cell for claim in self._claims.pop(name) for cell in claim):
                    if self._state[cell] == CLAIMED:
                        self._state[cell] = FREE
                        self._cursor = min(self._cursor, cell)

    # -- reading ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, sync: bool = True) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if sync:
                self._sync()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lines(self, start: int) -> Iterator[bytes]:
        with open(os.dup(self._file), "rb") as stream:
            stream.seek(start)
            yield from stream

    def _check_header(self) -> None:
        """Write the header of a new journal, or compare it with the one there."""
        first = next(self._lines(0), b"")
        if not first.endswith(b"\n"):  # new, or cut off within its first line
            self._cut(0)
            self._write(record("header", 1, json.dumps(self._header)))
            os.fsync(self._file)
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
            return
        parsed = _parse(first)
        remedy = "Use another directory."
        written = None
        if parsed is not None and parsed[0] == b"header":
            with contextlib.suppress(ValueError, RecursionError):
                written = json.loads(parsed[2].decode())
        if not isinstance(written, dict):
            raise InputError(
                str(self.path), "a damaged or foreign first line", "be a sweep's journal", remedy
            )
        if written.get("fingerprint") != self._header["fingerprint"]:
            keys = dict.fromkeys([*self._header, *written])
            differing = ", ".join(
                key for key in keys if key != "fingerprint" and written.get(key) != self._header.get(key)
            )
            raise InputError(
                str(self.path.parent),
                f"a directory that holds another sweep (differing in {differing or 'the contents of a file'})",
                "hold nothing or this very sweep",
                remedy,
            )
        self._offset = len(first)

    def _sync(self, *, opening: bool = False) -> None:
        """Take in what has been appended since; drop a torn end, whose writer is dead. Needs the lock."""
        for line in self._lines(self._offset) if os.fstat(self._file).st_size > self._offset else ():
            if not line.endswith(b"\n"):
                self._cut(self._offset)
                return
            self._offset += len(line)
            parsed = _parse(line)
            if parsed is None:
                continue
            kind, key, payload = parsed
            cells = self._cells(key)
            if kind == b"claim":
                name = payload.decode("utf-8", "replace")
                if _NAME.fullmatch(name):
                    self._claims.setdefault(name, []).append(cells)
                    for cell in cells:
                        if self._state[cell] == FREE:
                            self._state[cell] = CLAIMED
            elif kind in ENDED:
                again = opening and self.retry_failed and kind == b"failed"
                for cell in cells:
                    self._state[cell] = FREE if again else ENDED[kind]

    def _cells(self, key: bytes) -> range:
        """The cells that a key speaks of; none, where the sweep has no such cells."""
        first, colon, stop = key.partition(b":")
        cells = range(int(first), int(stop) if colon else int(first) + 1)
        return cells if cells.stop <= len(self._state) else range(0)

    # -- writing ----------------------------------------------------------------------------------------

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._cut(self._offset)
            raise self._refusal(error) from error
        self._offset += len(data)

    def _refusal(self, error: OSError) -> SimulationError:
        kept = f"{self.done + self.failed:,} of {len(self._state):,} cells are kept"
        remedy = "make room and run the same sweep in the same directory to go on"
        return SimulationError(f"cannot write {self.path}: {error.strerror}. {kept}; {remedy}")

    def claim(self, most: int) -> range | None:
        """Take the next run of at most `most` free cells; None if there is none (left, or for now)."""
        with self._locked():
            first = self._state.find(FREE, self._cursor)
            if first < 0:
                self._free_the_dead()
                first = self._state.find(FREE, self._cursor)
                if first < 0:
                    return None
            stop = first + 1
            while stop < min(first + most, len(self._state)) and self._state[stop] == FREE:
                stop += 1
            self._write(record("claim", f"{first}:{stop}", self._name))
            self._state[first:stop] = bytes([CLAIMED]) * (stop - first)
            self._cursor = stop
            return range(first, stop)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add records of finished cells (made by `record`); on return they are on the disk."""
        lines = list(lines)
        with self._locked():
            self._write(b"".join(lines))
            try:
                os.fsync(self._file)
            except OSError as error:
                raise self._refusal(error) from error
        for line in lines:
            _, kind, key, _ = line.split(b" ", 3)
            self._state[int(key)] = ENDED[kind]

    # -- what is known ----------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Number of cells that ended well."""
        return self._state.count(DONE)

    @property
    def failed(self) -> int:
        """Number of cells that ended in an error."""
        return self._state.count(FAILED)

    @property
    def free(self) -> int:
        """Number of cells nobody has taken yet."""
        return self._state.count(FREE)

    def refresh(self) -> bool:
        """Read what others have done; return whether every cell has ended."""
        with self._locked():
            return FREE not in self._state and CLAIMED not in self._state

    def results(self, decoder: json.JSONDecoder) -> Iterator[tuple[int, bool, dict[str, Any]]]:
        """Yield (cell, whether it ended well, its values as decoded) by cell; memory is 8 bytes per cell."""
        places = np.full(len(self._state), -1, dtype=np.int64)
        place = 0
        for line in self._lines(0):
            parsed = _parse(line)
            if parsed is not None and parsed[0] in ENDED:
                cells = self._cells(parsed[1])
                places[cells.start : cells.stop] = place
            place += len(line)
        with open(os.dup(self._file), "rb") as stream:
            for cell in np.flatnonzero(places >= 0).tolist():
                stream.seek(int(places[cell]))
                parsed = _parse(stream.readline())
                assert parsed is not None
                done = parsed[0] == b"done"
                yield cell, done, self._values(cell, parsed[2], done, decoder)

    def _values(self, cell: int, payload: bytes, done: bool, decoder: json.JSONDecoder) -> dict[str, Any]:
        """What the record of a cell holds: plain values, or a diagnosis."""
        values: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            read = decoder.decode(payload.decode())
            if b"\\u" in payload:  # a single surrogate could not be written to the table
                json.dumps(read, ensure_ascii=False).encode()
            values = read
        plain = isinstance(values, dict) and are_plain(values.values())
        if not plain or not (done or isinstance(values.get("diagnosis"), str)):
            raise InputError(
                f"{self.path}, record of cell {cell}",
                payload[:80].decode("utf-8", "replace"),
                "hold what a sweep writes",
                "Remove the line; the cell then runs again.",
            )
        found: dict[str, Any] = values
        return found

    def close(self) -> None:
        """Leave: the process's claims are void from here on."""
        _open_journals.discard(self)
        if self._member >= 0:
            self._member_path(self._name).unlink(missing_ok=True)
            os.close(self._member)
            self._member = -1
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_inherited() -> None:
    """In a forked child: a copy of a lock held there would keep a dead parent alive."""
    for journal in list(_open_journals):
        for descriptor in (journal._member, journal._file):
            if descriptor >= 0:
                os.close(descriptor)
        journal._member = journal._file = -1


os.register_at_fork(after_in_child=_close_inherited)
