"""The journal: what was appended is there after any accident, and no cell is given to two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fluidsched.errors import InputError
from fluidsched.sweeps.journal import Journal, record

JSON = json.JSONDecoder()
HEADER = {"schema": "test", "fingerprint": "f", "seed": 1}


def opened(directory: Path, *, cells: int = 10, join: bool = False, retry: bool = False) -> Journal:
    return Journal(directory, HEADER, cells, join=join, retry_failed=retry)


def done(cell: int) -> bytes:
    return record("done", cell, f'{{"v": {cell}}}')


def finished(directory: Path, cells: int) -> list[int]:
    with opened(directory, cells=cells) as journal:
        return [cell for cell, *_ in journal.results(JSON)]


def test_cells_are_claimed_in_runs_and_once(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        assert [journal.claim(4), journal.claim(4), journal.claim(4), journal.claim(4)] == [
            range(4), range(4, 8), range(8, 10), None,
        ]  # fmt: skip


def test_what_was_appended_is_done_after_reopening_and_the_rest_is_free(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.claim(6)
        journal.append([done(1), record("failed", 4, '{"diagnosis": "d"}')])
        assert (journal.done, journal.failed) == (1, 1)
    with opened(tmp_path) as journal:
        assert [journal.claim(9) for _ in range(4)] == [range(1), range(2, 4), range(5, 10), None]
        assert list(journal.results(JSON)) == [(1, True, {"v": 1}), (4, False, {"diagnosis": "d"})]


def test_failed_cells_run_again_on_request_and_the_later_record_counts(tmp_path: Path) -> None:
    with opened(tmp_path, cells=2) as journal:
        journal.claim(2)
        journal.append([record("failed", 0, '{"diagnosis": "d"}'), done(1)])
        assert journal.claim(1) is None
    with opened(tmp_path, cells=2, retry=True) as journal:
        assert journal.claim(2) == range(1)
        journal.append([done(0)])
        assert [ok for _, ok, _ in journal.results(JSON)] == [True, True]
        assert journal.refresh()


def test_every_truncation_keeps_the_records_before_it(tmp_path: Path) -> None:
    """Cut at any byte: the journal opens, has exactly the whole records before the cut, and can go on."""
    with opened(tmp_path, cells=4) as journal:
        journal.claim(4)
        journal.append([done(0), done(1)])
        journal.append([done(2)])
    whole = (tmp_path / "journal.txt").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "journal.txt").write_bytes(whole[:size])
        expected = [cell for cell in range(3) if done(cell) in whole[:size]]
        with opened(tmp_path, cells=4) as journal:
            assert [cell for cell, *_ in journal.results(JSON)] == expected
            while (cells := journal.claim(4)) is not None:
                journal.append(map(done, cells))
        assert finished(tmp_path, 4) == [0, 1, 2, 3]


def test_any_damage_behind_the_header_costs_only_the_records_it_hits(tmp_path: Path) -> None:
    """Random bytes overwritten, appended or inserted: no wrong record is ever believed."""
    with opened(tmp_path, cells=20) as journal:
        for cell in range(20):
            journal.claim(1)
            journal.append([done(cell)])
    whole = (tmp_path / "journal.txt").read_bytes()
    start = whole.index(b"\n") + 1
    random = np.random.default_rng(3)
    for _ in range(100):
        place, length = int(random.integers(start, len(whole))), int(random.integers(1, 60))
        garbage = random.bytes(length)
        replaced = int(random.choice([0, length]))
        (tmp_path / "journal.txt").write_bytes(whole[:place] + garbage + whole[place + replaced :])
        untouched = [
            cell
            for cell in range(20)
            if done(cell) in whole[start:place] or b"\n" + done(cell) in whole[place + replaced :]
        ]
        with opened(tmp_path, cells=20) as journal:
            results = list(journal.results(JSON))
            assert all(ok and value == {"v": cell} for cell, ok, value in results)
            assert set(untouched) <= {cell for cell, *_ in results}
            while (cells := journal.claim(4)) is not None:
                journal.append(map(done, cells))
        assert finished(tmp_path, 20) == list(range(20))


def test_another_sweep_or_a_foreign_file_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(InputError, match=r"holds another sweep \(differing in seed\)"):
        Journal(
            tmp_path, {"schema": "test", "seed": 2, "fingerprint": "g"}, 10, join=False, retry_failed=False
        )
    (tmp_path / "journal.txt").write_text("notes\nof mine\n")
    with pytest.raises(InputError, match="be a sweep's journal"):
        opened(tmp_path)
    assert (tmp_path / "journal.txt").read_text() == "notes\nof mine\n"


def test_a_second_process_is_refused_or_joins(tmp_path: Path) -> None:
    with opened(tmp_path) as first:
        with pytest.raises(InputError, match="in use by"):
            opened(tmp_path)
        assert first.claim(3) == range(3)
        with opened(tmp_path, join=True) as second:
            assert second.claim(3) == range(3, 6)
            assert first.claim(2) == range(6, 8)
            second.append([done(4)])
            assert not first.refresh()
            assert first.done == 1
            assert second.claim(5) == range(8, 10)
            assert first.claim(5) is None, "held by a living process"
        assert [first.claim(5) for _ in range(4)] == [range(3, 4), range(5, 6), range(8, 10), None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.txt"]


def test_a_forked_child_does_not_keep_a_dead_parent_alive(tmp_path: Path) -> None:
    """Executors that fork copy the descriptors, and so the locks, of the process that opened the journal."""
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    parent = os.fork()
    if parent == 0:
        journal = opened(tmp_path)
        journal.claim(4)
        if os.fork() == 0:
            os.write(from_child, b"up")
            os.close(from_parent)
            os.read(to_child, 1)  # until the test ends
        else:
            os.kill(os.getpid(), 9)
        os._exit(0)
    os.waitpid(parent, 0)
    assert os.read(to_parent, 2) == b"up"
    with opened(tmp_path) as journal:
        assert journal.claim(4) == range(4)
    os.close(from_parent)


def test_record_is_one_line_with_its_checksum() -> None:
    line = record("done", 7, '{"a": "ä\\n"}')
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
