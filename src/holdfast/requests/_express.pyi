"""Types of the compiled module; `native/express.c` is what they describe."""

from collections.abc import Callable
from typing import Any

VERSION: int
SOURCE_DIGEST: str

class Track:
    def __new__(
        cls,
        generation: Any,
        attempt: Any,
        reply: Any,
        table: Any,
        fragments: list[bytes | None],
        prefix: bytes,
        suffix: bytes,
        ticks: list[int],
        burst: Callable[[int], None],
        transport: Any,
        fd: int,
        until: int,
        /,
    ) -> Track: ...
    def ride(self, until: int, /) -> None: ...
    def fresh(self) -> bytes: ...
    @property
    def attempt(self) -> Any: ...

def take(
    touched: list[Track], table: dict[int, Any], streams: bytes, indices: bytes, tokens: bytes, /
) -> list[tuple[int, int, int]]: ...
def deliver(
    touched: list[Track], tick: int, nothing: list[int], /
) -> tuple[list[Any], list[Any], list[tuple[Callable[[bytes], object], bytes]]]: ...
