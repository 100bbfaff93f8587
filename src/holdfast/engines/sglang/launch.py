"""Starts SGLang's processes and ends them; nothing of theirs outlives this worker, nor ends it behind its back.

SGLang's children ask the kernel to be killed together with the thread that started them, so that thread lives exactly
as long as they shall: it is one of its own. SGLang would also take over this process's signals and logging, and a few
seconds after the death of a child kill the whole process tree, streams unsaid; here it is started where it cannot do
the first, is kept from the second, and the watchdog that does the third is stopped: `on_death` tells instead, at once.

Must never know a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.base.errors import EngineFailed, HoldfastError
from holdfast.base.settings import InvalidSetting

log = logging.getLogger(__name__)

INSTALL_HINT = (
    "Install it with: pip install 'holdfast[sglang]', or tools/install_sglang.sh for a machine without a GPU."
)
END_SECONDS = 10.0
"""How long killed processes may take to be gone: a GPU context is freed meanwhile."""
_POLL = 0.02


class Launch:
    """One run of SGLang.

    Args:
        argv: as for ``sglang serve``.
        on_death: called once on the running loop when one of the processes is gone, or says that it fails.
    """

    def __init__(self, argv: list[str], on_death: Callable[[HoldfastError], None]):
        self._argv = argv
        self._on_death = on_death
        self._files: dict[int, int] = {}
        """pidfd by process id."""
        self._release = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Any] = self._loop.create_future()
        self._ended = self._signalled = False
        self._before: set[int] = set()
        self.engine: Any = None
        """SGLang's `Engine`, once started."""
        self.pids: tuple[int, ...] = ()
        """Processes whose end is SGLang's."""

    async def start(self) -> Any:
        """Return SGLang's `Engine`, loaded.

        Raises:
            InvalidSetting: it does not take its flags.
            EngineFailed: it is not installed, or could not start.
        """
        self._before = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: then nobody can
            self._loop.add_signal_handler(signal.SIGQUIT, self._child_fails)
            self._signalled = True
        thread = threading.Thread(target=self._run, name="holdfast-sglang", daemon=True)
        thread.start()
        self.engine = await self._started
        self.pids = tuple(self.engine.get_all_child_pids())
        for pid in self.pids:
            self._watch(pid)
        return self.engine

    async def end(self) -> None:
        """Kill every process and wait until they are gone. Idempotent."""
        if self._ended:
            return
        self._ended = True
        for pid in list(self._files):
            self._unwatch(pid)
        if self._signalled:
            self._loop.remove_signal_handler(signal.SIGQUIT)
        await asyncio.to_thread(self._kill)
        self._release.set()

    # ---- the thread that owns the processes ----

    def _run(self) -> None:
        try:
            engine = _start(self._argv)
        except BaseException as error:  # SystemExit is argparse's way to complain
            self._say(self._fail, error)
        else:
            self._say(self._succeed, engine)
        self._release.wait()

    def _say(self, function: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, argument)

    def _succeed(self, engine: Any) -> None:
        if not self._started.done():
            self._started.set_result(engine)

    def _fail(self, error: BaseException) -> None:
        if self._started.done():
            return
        if isinstance(error, SystemExit):
            self._started.set_exception(
                InvalidSetting("SGLang does not take the flags that were handed to it; it says above which.")
            )
        elif isinstance(error, HoldfastError):
            self._started.set_exception(error)
        else:
            why = f"SGLang could not start: {type(error).__name__}: {error}. Its own log, above, says more."
            self._started.set_exception(EngineFailed(why))

    # ---- their death ----

    def _watch(self, pid: int) -> None:
        try:
            self._files[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone(pid)
            return
        self._loop.add_reader(self._files[pid], self._gone, pid)

    def _unwatch(self, pid: int) -> None:
        file = self._files.pop(pid, None)
        if file is not None:
            self._loop.remove_reader(file)
            os.close(file)

    def _gone(self, pid: int) -> None:
        self._unwatch(pid)
        if not self._ended:
            self._on_death(EngineFailed(f"SGLang's process {pid} is gone.", pid=pid))

    def _child_fails(self) -> None:
        """SGLang's children send SIGQUIT before they end because of an error."""
        if not self._ended and self._started.done():
            self._on_death(EngineFailed("A process of SGLang has failed; its traceback is in the log above."))

    def _kill(self) -> None:
        """Kill what SGLang started, and what that started, and collect the remains."""
        children = [child for child in multiprocessing.active_children() if child.pid not in self._before]
        pids = {child.pid for child in children if child.pid is not None} | set(self.pids)
        for pid in [*pids, *(below for one in pids for below in _descendants(one))]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for child in children:
            child.join(END_SECONDS)
            if child.is_alive():
                log.error("SGLang's process %s is still there %g s after SIGKILL", child.pid, END_SECONDS)


def _start(argv: list[str]) -> Any:
    """Start SGLang in this thread; returns its `Engine`."""
    try:
        with _logging_kept():
            from sglang.srt.entrypoints import engine as module  # noqa: PLC0415
            from sglang.srt.server_args import prepare_server_args  # noqa: PLC0415

            arguments = prepare_server_args(argv)
        logging.getLogger("sglang").setLevel(arguments.log_level.upper())
    except ImportError as error:
        raise EngineFailed(f"SGLang cannot be loaded: {error}. {INSTALL_HINT}") from error
    kept = module.configure_logger
    module.configure_logger = _nothing
    try:
        engine = module.Engine(server_args=arguments)
    finally:
        module.configure_logger = kept
    import atexit  # noqa: PLC0415

    atexit.unregister(engine.shutdown)  # it would kill every child of this process, ours too
    watchdog = getattr(engine.tokenizer_manager, "_subprocess_watchdog", None)
    if watchdog is not None:
        watchdog.stop()
    return engine


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Keep the root logger as it is while something else sets it up anew."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def _nothing(*_: Any, **__: Any) -> None:
    return


def _descendants(pid: int) -> list[int]:
    """Return the processes below one, by ``/proc``; none where there is no such thing."""
    found = []
    for tasks in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError, ValueError):
            for child in map(int, tasks.read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found


class Sockets:
    """A private directory for the sockets on which SGLang tells its KV events; gone with `close`."""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="holdfast-sglang-"))

    def events(self, rank: int = 0) -> str:
        """Return the endpoint of a rank's publisher. SGLang numbers ranks itself where it reads "inproc" (its rule)."""
        return self._named("inproc-events", rank)

    def replay(self, rank: int = 0) -> str:
        """Return the endpoint where a rank's publisher is asked for what it has sent."""
        return self._named("inproc-replay", rank)

    def close(self) -> None:
        """Remove the directory. Idempotent."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _named(self, name: str, rank: int) -> str:
        return f"ipc://{self._place}/{name}" + (f"_dp{rank}" if rank else "")
