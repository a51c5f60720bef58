#!/usr/bin/env bash
# Make a place where vLLM's scheduler runs on a CPU, without its kernels, and the tests marked `vllm` with it:
#
#     bash scripts/make_vllm_environment.sh FOLDER && bash scripts/test_vllm.sh FOLDER
#
# About 1.7 GB and two minutes. The wheel of vLLM is taken apart for its Python files; torch's own build and the
# other requirements are those its scheduler imports. Versions are fixed here, unlike anywhere else, because
# they are what `fluidsched.integrations.vllm.SUPPORTED` was run with.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: make_vllm_environment.sh FOLDER}
mkdir -p "$folder"
cd "$folder"

python3.11 -m venv environment
pip=(environment/bin/python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install 'torch==2.13.0' regex cachetools psutil numpy requests tqdm blake3 py-cpuinfo \
    'transformers>=5.16.1,<5.21' 'huggingface_hub>=1.31' 'tokenizers>=0.23.2' safetensors 'protobuf>=5.29.6' \
    'pydantic>=2.12' orjson prometheus_client 'pillow>=13' filelock pyzmq msgspec pyyaml einops cloudpickle \
    python-json-logger pybase64 cbor2 setproctitle aiohttp oss-harmony openai uvloop 'fastapi<0.137,>=0.133' \
    partial-json-parser 'llguidance<1.8,>=1.7'
"${pip[@]}" install --no-deps 'xgrammar==0.2.8' 'apache-tvm-ffi==0.1.11' # their requirements are for GPUs
"${pip[@]}" install -e "$here" pytest pytest-benchmark pytest-xdist hypothesis
"${pip[@]}" download --no-deps --dest wheel 'vllm==0.33.0'
environment/bin/python -m zipfile -e wheel/vllm-*.whl unpacked
mkdir -p vllm
mv unpacked/vllm unpacked/vllm-*.dist-info vllm/
find vllm -name '*.so' -delete
rm -rf wheel unpacked
