#!/usr/bin/env bash
# Build the source distribution and the wheel, hold them against each other, and use the wheel alone:
#
#     bash scripts/test_packages.sh FOLDER [pytest arguments]
#
# In FOLDER, which is made, an environment gets the wheel and what it requires, nothing else: there, outside of any
# checkout, the main job, the doctor and the README's Python run. Then the `test` extra is added, and the tests of the
# source distribution run against the wheel: by default those of files, tables and documents that depend on what is packed.
# PYTHON says with which interpreter (default python3).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: test_packages.sh FOLDER [pytest arguments]}
shift
mkdir -p "$folder/empty"
folder=$(cd "$folder" && pwd)
unset PYTHONPATH
export MPLBACKEND=Agg

"${PYTHON:-python3}" -m venv "$folder/environment"
python=("$folder/environment/bin/python" -I) # -I: neither the current folder nor variables add to the path
pip=("${python[@]}" -m pip --quiet --disable-pip-version-check)

"${PYTHON:-python3}" -m venv "$folder/builder"
"$folder/builder/bin/python" -m pip --quiet --disable-pip-version-check install build
"$folder/builder/bin/python" -m build --outdir "$folder/built" "$here" >/dev/null # the wheel from the sdist
"$folder/builder/bin/python" -m build --wheel --outdir "$folder/direct" "$here" >/dev/null
rm -rf "$folder/builder"

"${python[@]}" - "$here" "$folder"/built/*.whl "$folder"/direct/*.whl <<'PYTHON'
"""Both wheels hold the same bytes: the package's files that git knows, and their metadata."""
import subprocess, sys, zipfile

here, *wheels = sys.argv[1:]
contents = []
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        contents.append({name: archive.read(name) for name in archive.namelist()})
assert contents[0] == contents[1], "the wheel built from the sdist differs from the one built from the checkout"
known = subprocess.run(["git", "-C", here, "ls-files", "fluidsched"], capture_output=True, text=True, check=True)
packed = {name for name in contents[0] if ".dist-info/" not in name}
assert packed == set(known.stdout.split()), packed ^ set(known.stdout.split())
for name in ("LICENSE", "NOTICE"):
    assert any(path.endswith(f"licenses/{name}") for path in contents[0]), name
print(f"{len(packed)} files in the wheel, the same from the sdist and from the checkout")
PYTHON

"${pip[@]}" install "$folder"/built/*.whl
cd "$folder/empty"
"${python[@]}" -c 'import fluidsched, sys; assert fluidsched.__file__.startswith(sys.prefix), fluidsched.__file__'
"$folder/environment/bin/fluidsched" plan --quiet
for file in policy.json report.html manifest.json; do test -s "fluidsched-plan-1/$file"; done
"$folder/environment/bin/fluidsched" doctor
awk '/^```python/ {inside = 1; next} /^```/ {inside = 0} inside' "$here/README.md" >readme.py
"${python[@]}" readme.py

"${pip[@]}" install "$(echo "$folder"/built/*.whl)[test]"
"${python[@]}" -m pip check
mkdir "$folder/source"
tar -xzf "$folder"/built/*.tar.gz --strip-components=1 -C "$folder/source"
rm -r "$folder/source/fluidsched" # what is tested is the wheel
cd "$folder/source"
if (($# == 0)); then
    set -- tests/policy/test_table.py tests/server/test_catalog.py tests/workload/test_embedded_workloads.py \
        tests/plan/test_import.py tests/plan/test_spec_files.py tests/trust/test_sources.py tests/test_architecture.py
fi
"$folder/environment/bin/python" -m pytest "$@"
