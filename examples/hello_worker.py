"""An endpoint of one's own, served until the process is told to stop.

python examples/hello_worker.py &
python examples/hello_client.py Ada
"""

import asyncio

from holdfast.runtime.api import run


async def hello(request, context):
    for word in f"Hello, {request['name']}! Holding fast until you say stop.".split():
        if context.is_stopped():
            return
        yield {"word": word}
        await asyncio.sleep(0.01)


async def main(runtime):
    await runtime.namespace("hello").component("backend").endpoint("generate").serve_endpoint(hello)


if __name__ == "__main__":
    run(main)
