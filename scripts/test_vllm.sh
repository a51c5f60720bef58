#!/usr/bin/env bash
# Run the tests marked `vllm` in the folder that make_vllm_environment.sh made; further arguments go to pytest.
set -euo pipefail
folder=$(cd "${1:?usage: test_vllm.sh FOLDER [pytest arguments]}" && pwd)
shift
cd "$(dirname "$0")/.."
PYTHONPATH="$folder/vllm" VLLM_LOGGING_LEVEL=WARNING \
    "$folder/environment/bin/python" -m pytest tests/integrations -m vllm -W default "$@"
