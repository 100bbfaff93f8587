"""Memory, shared memory, processes' limits, GPUs and ports of this machine. Must never change or reserve anything."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path

import msgspec

from holdfast.doctor.finding import Finding, Level

GIB = 1 << 30
FILES_WANTED = 65_536
"""Open files: a connection per stream and some."""
FILES_NEEDED = 4_096
SHM_WANTED = 1 * GIB
"""Engines with several processes pass tensors through /dev/shm; containers give 64 MiB unless told otherwise."""
SHM_NEEDED = 256 << 20
_SMI_SECONDS = 15.0
_QUERY = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")


class Gpu(msgspec.Struct, frozen=True):
    """One GPU; memory in bytes."""

    name: str
    total: int
    free: int
    driver: str
    capability: str


def look_at_gpus(*, needed: bool = False, tool: str = "nvidia-smi") -> tuple[list[Gpu], list[Finding]]:
    """Return the GPUs, and what to say of them.

    Args:
        needed: whether an engine that cannot do without one is to be run.
        tool: the driver's own program.
    """
    path = shutil.which(tool)
    if path is None:
        fix = "Install the NVIDIA driver, or give the container its GPUs." if needed else ""
        text = "No NVIDIA driver here (nvidia-smi is missing)."
        return [], [Finding("gpu", "problem" if needed else "note", text, fix)]
    try:
        query = f"--query-gpu={','.join(_QUERY)}"
        command = [path, query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], [Finding("gpu", "problem", f"nvidia-smi does not answer: {error}", "Look at dmesg; reboot.")]
    if done.returncode:
        why = (done.stdout + done.stderr).strip().splitlines()[:1]
        fix = "Driver and kernel module differ, or the GPU fell off the bus: look at dmesg, reload the driver."
        return [], [Finding("gpu", "problem", f"nvidia-smi fails: {' '.join(why)}", fix)]
    gpus = [gpu for gpu in map(_gpu, done.stdout.strip().splitlines()) if gpu is not None]
    return gpus, [_about(gpu) for gpu in gpus]


def _about(gpu: Gpu) -> Finding:
    text = (
        f"{gpu.name}: {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, driver {gpu.driver}, compute capability "
        f"{gpu.capability}"
    )
    if gpu.free > 0.5 * gpu.total:
        return Finding("gpu", "ok", text)
    return Finding("gpu", "warning", text, "Somebody else uses it; nvidia-smi shows who.")


def _gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_QUERY):
        return None
    try:
        total, free = (int(float(part)) << 20 for part in parts[1:3])
    except ValueError:
        return None
    return Gpu(parts[0], total, free, parts[3], parts[4])


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that new processes can have: of the machine, or what the container's limit leaves."""
    available = 0
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, int(limit) - used) if limit.isdigit() else available


def look_at_memory(needed: int, what: str, available: int) -> list[Finding]:
    """Return whether so many bytes are to be had.

    Args:
        needed: bytes; 0: unknown.
        what: what needs them.
        available: bytes.
    """
    have = f"{available / GIB:.1f} GiB of memory are available"
    if not needed:
        return [Finding("memory", "note", f"{have}.", "", {"available": available})]
    facts = {"available": available, "needed": needed}
    text = f"{what} need about {needed / GIB:.1f} GiB; {have}"
    if needed > available:
        fix = "Lower the context length or the number of sequences, take a smaller model, or end what else runs."
        return [Finding("memory", "problem", text, fix, facts)]
    tight = needed >= 0.8 * available
    return [Finding("memory", "warning" if tight else "ok", text, "Little is left for more." if tight else "", facts)]


def look_at_limits(shm: Path = Path("/dev/shm")) -> list[Finding]:
    """Return what this process may open and lock, and how much shared memory there is."""
    findings = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = f"{soft} open files are allowed (up to {hard})"
    fix = f"ulimit -n {FILES_WANTED}, LimitNOFILE= in the unit, or --ulimit nofile={FILES_WANTED} of the container."
    level: Level = "ok" if _enough(soft, FILES_WANTED) else "warning" if _enough(soft, FILES_NEEDED) else "problem"
    findings.append(Finding("limits", level, files, "" if level == "ok" else fix, {"open_files": soft}))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not _enough(locked, 1 << 40):
        text = f"{locked >> 10} KiB of memory may be locked; RDMA transfers of KV blocks need more"
        findings.append(Finding("limits", "note", text, "ulimit -l unlimited, if KV blocks travel by RDMA."))
    findings.append(_shared_memory(shm))
    return findings


def _enough(limit: int, wanted: int) -> bool:
    return limit in (resource.RLIM_INFINITY, -1) or limit >= wanted


def _shared_memory(shm: Path) -> Finding:
    try:
        stats = os.statvfs(shm)
    except OSError:
        return Finding("limits", "note", f"There is no {shm}; engines with several processes may need it.")
    free = stats.f_bavail * stats.f_frsize
    text = f"{free / GIB:.2f} GiB are free in {shm}"
    fix = "docker run --shm-size=2g (Kubernetes: an emptyDir with medium Memory there)."
    level: Level = "ok" if free >= SHM_WANTED else "warning" if free >= SHM_NEEDED else "problem"
    return Finding("limits", level, text, "" if level == "ok" else fix, {"shm_free": free})


def look_at_ports(ports: dict[str, tuple[str, int]]) -> list[Finding]:
    """Return which of these ``name: (host, port)`` can be bound now; port 0 is left out."""
    findings = []
    for name, (host, port) in ports.items():
        if not port:
            continue
        error = _bind_error(host, port)
        if error:
            fix = f"End what listens there ('ss -ltnp sport = :{port}' names it), or choose another port."
            findings.append(Finding("ports", "problem", f"{name}: {host}:{port} cannot be bound: {error}", fix))
        else:
            findings.append(Finding("ports", "ok", f"{name}: {host}:{port} is free"))
    return findings


def _bind_error(host: str, port: int) -> str:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""
