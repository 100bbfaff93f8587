"""Tells Prometheus where Holdfast's workers are: reads discovery, writes target files or answers over HTTP.

Workers that `holdfast serve` starts draw a free port for their status server at every start; their records in
discovery name it. Frontends are scraped at their HTTP port: name them with --frontend.

    python targets.py --frontend 127.0.0.1:8000 --write targets           # once
    python targets.py --frontend 127.0.0.1:8000 --write targets --every 5 # until stopped
    python targets.py --frontend 127.0.0.1:8000 --listen 127.0.0.1:9099   # for http_sd_configs

Must never write an empty list because discovery could not be read: unknown is not dead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery

START_SECONDS = 5.0
REQUEST_SECONDS = 5.0
REQUEST_BYTES = 8192

Groups = list[dict[str, Any]]


def groups(addresses: Iterable[str]) -> Groups:
    """Return addresses in the form that file_sd_configs and http_sd_configs read."""
    return [{"targets": [address]} for address in sorted(addresses)]


FRONTEND = "frontend"
"""Component name of the records that frontends publish."""
_OTHERS = (FRONTEND, SUPERVISOR)


def worker_groups(records: Iterable[InstanceRecord], namespace: str) -> Groups:
    """Return the status servers of all workers of a namespace; those without one cannot be scraped.

    Frontends have status servers too, with the same metrics as their HTTP port: they are named once, by --frontend.
    """
    return groups(
        r.system_address
        for r in records
        if r.namespace == namespace and r.system_address and r.component not in _OTHERS
    )


def supervisor_groups(records: Iterable[InstanceRecord], namespace: str) -> Groups:
    """Return the status servers of the supervisors of a namespace."""
    return groups(
        r.system_address for r in records if r.namespace == namespace and r.system_address and r.component == SUPERVISOR
    )


class Targets:
    """The present targets, by the name of their file or path."""

    def __init__(self, discovery: Discovery, namespace: str, frontends: list[str]):
        self._discovery = discovery
        self._namespace = namespace
        self._frontends = groups(frontends)
        self._workers: Groups = []
        self._supervisors: Groups = []

    def now(self) -> dict[str, Groups]:
        """Return all kinds; while discovery cannot be reached, those seen last."""
        if self._discovery.reachable:
            records = self._discovery.snapshot()
            self._workers = worker_groups(records, self._namespace)
            self._supervisors = supervisor_groups(records, self._namespace)
        return {"frontends": self._frontends, "workers": self._workers, "supervisors": self._supervisors}


def write(targets: Targets, directory: Path) -> None:
    """Write one file for each kind; whoever reads sees the old content or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, found in targets.now().items():
        path = directory / f"{name}.json"
        text = json.dumps(found, indent=2) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            fresh = path.with_suffix(".fresh")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)


async def answer(targets: Targets, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one GET of /frontends, /workers or /supervisors and close."""
    with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(REQUEST_SECONDS):
            words = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
            path = words[1].decode("latin-1").strip("/") if len(words) > 1 else ""
            found = targets.now().get(path)
            status = "404 Not Found" if found is None else "200 OK"
            body = json.dumps([] if found is None else found).encode()
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            writer.write(f"{head}connection: close\r\n\r\n".encode() + body)
            await writer.drain()
    writer.close()


async def run(args: argparse.Namespace, discovery: Discovery) -> int:
    """Do what the flags say; returns the exit code."""
    targets = Targets(discovery, args.namespace, args.frontend)
    stop = asyncio.Event()
    server: asyncio.Server | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with asyncio.timeout(START_SECONDS):
            await discovery.start()
        if not discovery.reachable:
            print("targets: discovery cannot be read; nothing written", file=sys.stderr)
            return 1
        server = await listen(targets, args.listen) if args.listen else None
        while True:
            if args.write:
                write(targets, args.write)
            if not args.every and server is None:
                return 0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), args.every or None)
            if stop.is_set():
                return 0
    except TimeoutError:
        print(f"targets: discovery did not answer within {START_SECONDS:g} s; nothing written", file=sys.stderr)
        return 1
    finally:
        if server is not None:
            server.close()
        await discovery.close()


async def listen(targets: Targets, where: str) -> asyncio.Server:
    """Serve the targets at ``host:port``."""
    host, _, port = where.rpartition(":")
    return await asyncio.start_server(lambda r, w: answer(targets, r, w), host, int(port), limit=REQUEST_BYTES)


def main() -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frontend", action="append", default=[], metavar="HOST:PORT", help="may be repeated")
    parser.add_argument(
        "--write", type=Path, metavar="DIRECTORY", help="write frontends.json, workers.json and supervisors.json"
    )
    parser.add_argument("--every", type=float, default=0.0, metavar="SECONDS", help="write again and again")
    parser.add_argument(
        "--listen", default="", metavar="HOST:PORT", help="answer /frontends, /workers and /supervisors over HTTP"
    )
    namespace = os.environ.get("DYN_NAMESPACE", "dynamo")
    parser.add_argument("--namespace", default=namespace, help="as in DYN_NAMESPACE")
    parser.add_argument("--discovery-backend", default="", help="as in DYN_DISCOVERY_BACKEND")
    parser.add_argument("--file-kv", default="", metavar="DIRECTORY", help="as in DYN_FILE_KV")
    args = parser.parse_args()
    if not args.write and not args.listen:
        parser.error("say --write DIRECTORY or --listen HOST:PORT")
    try:
        return asyncio.run(run(args, open_discovery(args.discovery_backend, root=args.file_kv)))
    except (HoldfastError, OSError) as error:
        print(f"targets: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
