"""Runs the benchmarks and prints one table. ``python -m bench [--quick] [PART …]``."""

from __future__ import annotations

import argparse
import asyncio
import sys

from bench.kv_index import kv_index
from bench.kv_join import kv_join
from bench.kv_router import kv_router
from bench.moves import kills
from bench.table import Row, show
from bench.token_path import first_token, paced, saturated, sizes

PARTS = {part.__name__: part for part in (sizes, paced, saturated, first_token, kills, kv_index, kv_router, kv_join)}


async def main(names: list[str], quick: bool) -> None:
    """Run the parts and print the table."""
    rows: list[Row] = []
    for name in names:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        rows += await PARTS[name](quick)
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a token, a request and a move to another worker cost.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.parts or list(PARTS), arguments.quick))
