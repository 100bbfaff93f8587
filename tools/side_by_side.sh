#!/usr/bin/env bash
# Runs commands side by side and shows what each said when it is over, so that tests which wait for one process after the
# other use all cores: tools/side_by_side.sh "COMMAND" "COMMAND" … Fails if one fails; none outlives it.
set -uo pipefail
place=$(mktemp -d)
pids=()
trap 'kill $(jobs -pr) 2>/dev/null; wait; rm -rf "$place"' EXIT
trap 'exit 130' INT TERM
for command in "$@"; do
  bash -c "exec $command" >"$place/${#pids[@]}" 2>&1 &
  pids+=($!)
done
code=0
for at in "${!pids[@]}"; do
  wait "${pids[$at]}" || code=$?
  shift_to=$((at + 1))
  printf -- '--- %s\n' "${!shift_to}"
  cat "$place/$at"
done
exit "$code"
