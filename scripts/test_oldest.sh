#!/usr/bin/env bash
# Run tests with the oldest versions that pyproject.toml allows, on the oldest Python:
#
#     bash scripts/test_oldest.sh FOLDER [pytest arguments]
#
# FOLDER becomes an environment with each requirement of the package and of its `test` extra at its lower bound. Without
# arguments the rooms that lean on the dependencies most are tested; `tests` runs everything.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: test_oldest.sh FOLDER [pytest arguments]}
shift
unset PYTHONPATH

"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/python" - "$here/pyproject.toml" >"$folder/constraints.txt" <<'PYTHON'
"""Every lower bound as a constraint."""
import re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["test"], *extras["parquet"], *extras["dask"]]:
    if found := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
print("pyparsing<3.2")  # matplotlib 3.9 calls what newer ones warn of
PYTHON
"$folder/bin/python" -m pip --quiet --disable-pip-version-check install -c "$folder/constraints.txt" "$here[test]"
"$folder/bin/python" -m pip list --format=freeze | grep -iE "$(cut -d= -f1 "$folder/constraints.txt" | paste -sd'|')"
cd "$here"
if (($# == 0)); then
    set -- tests/fluid tests/queues tests/plan/test_import.py tests/plan/test_cli.py tests/plan/test_doctor.py \
        tests/plan/test_plots.py tests/plan/test_tuning.py tests/sweeps tests/workload tests/simulation/test_hand_traces.py tests/test_display.py
fi
MPLBACKEND=Agg "$folder/bin/python" -m pytest "$@"
