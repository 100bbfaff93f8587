"""Lines of the catalogue that every process has, and the supervisor's own. Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import SUPERVISOR, counter, gauge

PROCESS = (
    gauge("process_resident_memory_bytes", (), "Memory that is in use.", "every", "client"),
    gauge("process_virtual_memory_bytes", (), "Memory that is mapped.", "every", "client"),
    gauge("process_open_fds", (), "Open files, sockets included.", "every", "client"),
    gauge("process_max_fds", (), "Most files that may be open.", "every", "client"),
    counter("process_cpu_seconds_total", (), "CPU time, user and system.", "every", "client"),
    gauge("process_start_time_seconds", (), "When it started, in seconds since 1970.", "every", "client"),
)

SUPERVISION = (
    gauge(
        f"{SUPERVISOR}slot_state",
        ("slot", "state"),
        "1 for the state of a slot: starting, running, restarting, gave-up or stopped; 0 for the others.",
        "supervisor",
        "holdfast",
    ),
    counter(
        f"{SUPERVISOR}restarts_total",
        ("slot",),
        "Starts of a slot's process after its first one, crashes and replacements alike.",
        "supervisor",
        "holdfast",
    ),
    counter(
        f"{SUPERVISOR}rolling_restarts_total", (), "Rolling restarts that have ended.", "supervisor", "holdfast"
    ),
    gauge(
        f"{SUPERVISOR}rolling_restart_under_way", (), "1 while one process after the other is replaced, else 0.",
        "supervisor", "holdfast",
    ),
)  # fmt: skip
