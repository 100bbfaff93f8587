"""Calls whatever instance serves hello.backend.generate; see hello_worker.py."""

import sys

from holdfast.runtime.api import Context, run


async def main(runtime):
    client = await runtime.endpoint("hello.backend.generate").client()
    await client.wait_for_instances()
    context = Context("greeting-1")  # context.stop() from anywhere ends the call at the worker, too
    async for item in await client.generate({"name": sys.argv[1] if len(sys.argv) > 1 else "you"}, context=context):
        print(item["word"], flush=True)


if __name__ == "__main__":
    run(main)
