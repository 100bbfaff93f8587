"""A bound on the memory of one process, behind which the kernel kills it: a control group of its own.

Works with either version of control groups, as root. Must never touch a group that it did not make.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from holdfast.base.errors import HoldfastError

ROOT = Path("/sys/fs/cgroup")


class CannotLimit(HoldfastError):
    """No control group could be made; the message has the system's words."""

    code = "cannot_limit"
    fault = "caller"
    status = 400
    hint = "Run as root, with a memory controller under /sys/fs/cgroup."


class MemoryLimit:
    """See the module. `close` it once the process has ended.

    Args:
        name: of the group; must be new.
        root: where control groups are.

    Raises:
        CannotLimit: not permitted, or there is no memory controller.
    """

    def __init__(self, name: str, root: Path = ROOT):
        first = (root / "memory").is_dir()
        self._group = (root / "memory" if first else root) / name
        self._bound = self._group / ("memory.limit_in_bytes" if first else "memory.max")
        try:
            self._group.mkdir()
            if not self._bound.exists():
                self.close()
                raise CannotLimit(f"{self._bound} does not exist: the memory controller is not enabled.")
        except OSError as error:
            raise CannotLimit(f"The control group {self._group} cannot be made: {error}.") from error

    def hold(self, pid: int, more: int) -> None:
        """Let a process get that many bytes more than it has now. Raises CannotLimit when the system does not."""
        try:
            self._bound.write_text(str(more))
            (self._group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise CannotLimit(f"Process {pid} cannot be put into {self._group}: {error}.") from error

    def close(self) -> None:
        """Remove the group."""
        with contextlib.suppress(OSError):
            self._group.rmdir()
