"""Feed the readers of files from a coverage-guided fuzzer (atheris, libFuzzer's engine for Python).

    pip install atheris
    python scripts/fuzz.py table-json -runs=100000 -max_len=4096

The first argument names a reader of `tests/trust/hostile_readers.py`, or "all" to let the first byte choose; the rest
go to libFuzzer, whose corpus starts from the reader's own valid files. Half of the inputs are mutated as bytes by
libFuzzer, half as JSON values or with hostile tokens put in. Any exception but the library's own ends the run and
leaves the input in a file; it then belongs, made small, among the cases of `tests/trust/test_hostile_files.py`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "trust"))
with atheris.instrument_imports(include=["fluidsched"]):
    import hostile_readers


def main() -> None:
    """Set up the readers and their corpus, and hand over to libFuzzer."""
    folder = Path(tempfile.mkdtemp(prefix="fluidsched-fuzz-"))
    known = hostile_readers.readers(folder)
    chosen = sys.argv[1] if len(sys.argv) > 1 else "all"
    names = list(known) if chosen == "all" else [chosen]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, name in enumerate(names):
        for index, seed in enumerate(known[name].seeds):
            (corpus / f"{name}-{index}").write_bytes(bytes([number]) + seed)
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)

    def once(data: bytes) -> None:
        if data:
            reader = known[names[data[0] % len(names)]]
            hostile_readers.survives(reader, folder / f"input{reader.suffix}", data[1:])

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        number = data[0] % len(names) if data else 0
        return bytes([number]) + hostile_readers.hostile_input(known[names[number]], rng)[: most - 1]

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
