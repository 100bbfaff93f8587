#!/usr/bin/env bash
# Installs Prometheus, Alertmanager, their checkers (promtool, amtool) and haproxy from Debian, without starting any
# service: the tests of tests/observability and tests/balancing start their own. Does nothing when all of them are there.
# Needs root or sudo.
set -euo pipefail

missing() {
  local name
  for name in prometheus promtool amtool haproxy; do
    command -v "$name" >/dev/null || return 0
  done
  ! command -v prometheus-alertmanager >/dev/null && ! command -v alertmanager >/dev/null
}

missing || exit 0
if ! command -v apt-get >/dev/null; then
  echo "install_operations: no apt-get here; install prometheus, promtool, alertmanager, amtool and haproxy yourself" >&2
  exit 1
fi
root=()
[ "$(id -u)" -eq 0 ] || root=(sudo)

# Packages start their services when they are installed, unless this file says no.
policy=/usr/sbin/policy-rc.d
mine=""
if [ ! -e "$policy" ]; then
  mine=$policy
  printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" >/dev/null
  "${root[@]}" chmod 755 "$policy"
fi
log=$(mktemp)
finish() {
  local code=$?
  [ -z "$mine" ] || "${root[@]}" rm -f "$mine"
  [ "$code" -eq 0 ] || tail -n 30 "$log" >&2
  rm -f "$log"
}
trap finish EXIT

begin=$SECONDS
apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
"${apt[@]}" update >>"$log" 2>&1
"${apt[@]}" install -y --no-install-recommends prometheus prometheus-alertmanager haproxy >>"$log" 2>&1
if command -v systemctl >/dev/null; then # not at the next boot either
  "${root[@]}" systemctl disable prometheus prometheus-alertmanager haproxy >>"$log" 2>&1 || true
fi
echo "install_operations: prometheus, alertmanager and haproxy installed in $((SECONDS - begin)) s, no service started"
