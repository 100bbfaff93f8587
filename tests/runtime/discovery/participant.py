"""A process that publishes one record and prints what it sees; driven by test_file.py through pipes and signals."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.file import FileDiscovery, FileSettings
from holdfast.runtime.discovery.judge import JudgeSettings


async def main(root: str, instance: str, epoch: str, ttl: str) -> None:
    discovery = FileDiscovery(Path(root), FileSettings(JudgeSettings(ttl=float(ttl), settle=0.4)))
    await discovery.start()
    record = InstanceRecord(
        "dynamo", "backend", ("generate",), InstanceId(instance), Epoch(int(epoch)), "127.0.0.1:1", os.getpid()
    )
    await discovery.publish(record)
    print("up", flush=True)
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[str] = asyncio.Queue(16)

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(commands.put_nowait, line.strip())

    threading.Thread(target=read, daemon=True).start()
    while True:
        match await commands.get():
            case "block":
                time.sleep(2.5)  # noqa: ASYNC251  a busy loop, on purpose
                print("blocked", flush=True)
            case count if count.isdigit():
                for number in range(int(count)):
                    await discovery.publish(
                        InstanceRecord(
                            "dynamo",
                            "backend",
                            ("generate",),
                            InstanceId(instance),
                            Epoch(int(epoch)),
                            "127.0.0.1:1",
                            os.getpid(),
                            meta={"number": number, "filler": "x" * 20_000},
                        )
                    )
            case "close":
                await discovery.close()
                return


asyncio.run(main(*sys.argv[1:]))
