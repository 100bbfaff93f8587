"""The status server: is this process alive, can it be used, what does it measure.

``/live`` says whether the process runs its event loop, and nothing else: it never fails because an engine is
slow, hung, draining or gone. ``/health`` says whether work can be sent here now, and if not, why. Both are
answered from a board that the event loop fills in passing, by a thread that waits for nobody.

The thread counts how many of its own ticks went by without a heartbeat of the loop. Ticks on which it was late
itself (the machine paused, the process was stopped) are not counted against the loop.

Must never ask the event loop anything while answering ``/live`` or ``/health``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from holdfast.health.config import SystemConfig
from holdfast.health.control import PREFIX, ControlRoutes
from holdfast.health.fairness import let_threads_in
from holdfast.health.http import JSON, Answer, HttpRequest, message
from holdfast.health.listener import TICK_SECONDS, Listener, Pending
from holdfast.health.readiness import Verdict

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.25
LATE_SECONDS = 10.0
"""An event loop that has not run for so long can take no work, whatever the board says."""
REFRESH_SECONDS = 0.5
"""How long a scrape waits for gauges to be brought up to date."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_READ = ("GET", "HEAD")

Metrics = Callable[[], bytes]
"""Renders the metrics; called in a thread of its own, one call at a time."""


class Board(msgspec.Struct, frozen=True):
    """What the event loop lets others know. Replaced as a whole, never changed."""

    verdict: Verdict
    more: dict[str, Any] = {}
    """Further facts for ``/health``: state, load … The key names are the process's own."""
    metadata: bytes | None = None
    """JSON: what this process has published in discovery."""


class StatusServer:
    """See the module.

    Args:
        config: where to listen, what to say.
        metrics: for ``/metrics``; None: there are none.
        refresh: brings gauges up to date before they are rendered; called on the event loop, and not waited for
            when that is stuck.
        more: called on every heartbeat, on the event loop: the further facts of the board.
        judge: called on every heartbeat, on the event loop: the verdict; None: `post` brings it.
    """

    def __init__(
        self,
        config: SystemConfig,
        *,
        metrics: Metrics | None = None,
        refresh: Callable[[], None] | None = None,
        more: Callable[[], dict[str, Any]] = dict,
        judge: Callable[[], Verdict] | None = None,
    ):
        self.address = ""
        """``host:port`` once started; empty: switched off."""
        self.control = ControlRoutes(config.system_token)
        self._config = config
        self._metrics = metrics
        self._refresh = refresh
        self._loop: asyncio.AbstractEventLoop | None = None
        self._more = more
        self._judge = judge
        self._board = Board(Verdict(config.system_starting_health_status == "ready", {}, ()))
        self._beats = 0
        self._armed = False
        self._seen = (0, 0)
        """As the thread has it: the last beat seen, and ticks on time since then."""
        self._started = 0.0
        self._listener: Listener | None = None
        self._renderer: concurrent.futures.ThreadPoolExecutor | None = None
        self._timer: asyncio.TimerHandle | None = None

    # on the event loop

    def start(self) -> None:
        """Listen and answer from now on; nothing happens when the port is negative.

        Raises:
            Conflict: the port is taken.
            CannotConnect: the address cannot be used.
        """
        config = self._config
        if config.system_port < 0:
            return
        let_threads_in()
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._listener = Listener(config.system_host, config.system_port, self._answer, self._tick)
        self._renderer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="holdfast-metrics")
        self.address = self._listener.address
        self._listener.start()
        self._beat()
        log.info("status server: http://%s%s", self.address, config.system_health_path)

    @property
    def verdict(self) -> Verdict:
        """What ``/health`` shows at present."""
        return self._board.verdict

    def arm(self) -> None:
        """The process has started: from now on a missing heartbeat makes ``/live`` fail."""
        self._armed = True

    def post(self, verdict: Verdict, metadata: bytes | None = None) -> None:
        """Show a new verdict, at once.

        Args:
            verdict: of `Readiness`.
            metadata: the published record as JSON; None: as before.
        """
        kept = self._board.metadata if metadata is None else metadata
        self._board = Board(verdict, self._more(), kept)

    def close(self) -> None:
        """Stop answering. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.control.close()
        if self._listener is not None:
            self._listener.stop()
        if self._renderer is not None:
            self._renderer.shutdown(wait=False, cancel_futures=True)

    def _beat(self) -> None:
        self._beats += 1
        try:
            self.post(self._board.verdict if self._judge is None else self._judge())
        except Exception:
            log.exception("the facts for the status server could not be gathered; it shows the last ones")
        self._timer = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._beat)

    # in the listener's thread

    def _tick(self, on_time: bool) -> None:
        beats, missed = self._seen
        if beats != self._beats or not self._armed:
            self._seen = (self._beats, 0)
        elif on_time:
            self._seen = (beats, missed + 1)

    @property
    def _late(self) -> float:
        """Seconds since the last heartbeat, in steps of a tick; 0: fresh."""
        return self._seen[1] * TICK_SECONDS if self._seen[0] == self._beats else 0.0

    def _answer(self, request: HttpRequest, pending: Pending) -> Answer | None:
        path, config = request.path, self._config
        if self.control.owns(path):
            return self.control.serve(request, pending)
        answers: dict[str, Callable[[Pending], Answer | None]] = {
            config.system_health_path: self._health,
            config.system_live_path: self._live,
            "/metrics": self._render_metrics,
            "/metadata": self._metadata,
        }
        answer = answers.get(path)
        if answer is None:
            return message(404, f"Route not found. There are {', '.join(answers)} and {PREFIX}….")
        if request.method not in _READ:
            return Answer(405, message(405, "Use GET.").body, headers=(("allow", "GET, HEAD"),))
        return answer(pending)

    def _live(self, _: Pending) -> Answer:
        late, bound = self._late, self._config.system_live_timeout
        alive = late <= bound
        body: dict[str, Any] = {"status": "live" if alive else "stuck", "uptime": self._uptime(), "late_secs": late}
        if not alive:
            body["message"] = f"the event loop has not run for {late:g} s (bound {bound:g} s)"
        return _json(200 if alive else 503, body)

    def _health(self, _: Pending) -> Answer:
        board, late = self._board, self._late
        verdict = board.verdict
        reasons = list(verdict.reasons)
        if late > LATE_SECONDS:
            reasons.insert(0, f"the event loop has not run for {late:g} s")
        ready = verdict.ready and not reasons
        body = {
            "status": "ready" if ready else "notready",
            "uptime": self._uptime(),
            "endpoints": verdict.endpoints,
            "reasons": reasons,
            **board.more,
        }
        return _json(200 if ready else 503, body)

    def _metadata(self, _: Pending) -> Answer:
        found = self._board.metadata
        if found is None:
            return message(404, "This process has published nothing in discovery, or not yet.")
        return Answer(200, found, JSON)

    def _render_metrics(self, pending: Pending) -> Answer | None:
        if self._metrics is None or self._renderer is None:
            return Answer(200, b"", METRICS_TYPE)
        metrics = self._metrics

        def render() -> None:
            try:
                self._bring_up_to_date()
                pending.reply(Answer(200, metrics(), METRICS_TYPE))
            except Exception:
                log.exception("the metrics could not be rendered")
                pending.reply(message(500, "The metrics could not be rendered; the log says why."))

        self._renderer.submit(render)
        return None

    def _bring_up_to_date(self) -> None:
        if self._refresh is None or self._loop is None:
            return
        done = threading.Event()
        refresh = self._refresh

        def run() -> None:
            try:
                refresh()
            finally:
                done.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(run)
            done.wait(REFRESH_SECONDS)

    def _uptime(self) -> dict[str, int]:
        seconds = time.monotonic() - self._started
        return {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)}


def _json(status: int, body: dict[str, Any]) -> Answer:
    return Answer(status, msgspec.json.encode(body, enc_hook=str))
