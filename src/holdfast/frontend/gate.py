"""Who may call what: API keys for everything under /v1, and the debug routes kept to this machine.

Must never look at a body, and never log a key.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from holdfast.base.errors import InvalidRequest
from holdfast.frontend.config import FrontendConfig
from holdfast.openai.headers import RawHeaders, find_header
from holdfast.openai.keys import KeyRing
from holdfast.runtime.transport import is_loopback

REFRESH_SECONDS = 1.0
"""How often the key file is looked at."""
GUARDED = ("/debug", "/busy_threshold")
"""Beginnings of the paths that show requests or change something."""


class Forbidden(InvalidRequest):
    """Not for callers of this listener, whoever they are."""

    code = "forbidden"
    status = 403
    openai_type = "permission_error"


class Gate:
    """Asked once per request.

    Raises:
        KeyFileUnusable: the configured file with keys cannot be used.
    """

    def __init__(self, config: FrontendConfig):
        self._keys = KeyRing(Path(config.api_keys_file)) if config.api_keys_file else None
        self._local = is_loopback(config.http_host)
        self._looked_at = float("-inf")

    def admit(self, headers: RawHeaders) -> None:
        """Accept a call of the API, or raise.

        Raises:
            Unauthenticated: keys are asked for, and it brings none that is known.
        """
        keys = self._keys
        if keys is None:
            return
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= REFRESH_SECONDS:
            self._looked_at = now
            keys.refresh()
        keys.check(find_header(headers, b"authorization"))

    def admit_to(self, path: str, headers: RawHeaders) -> None:
        """Accept a call of any other route, or raise.

        Raises:
            Unauthenticated: as in `admit`.
            Forbidden: a debug or control route on a listener that other machines reach, and there are no keys.
        """
        if path.startswith("/v1/"):
            self.admit(headers)
        elif path.startswith(GUARDED) and not self._local:
            if self._keys is None:
                raise Forbidden(
                    "Debug and control routes are only for this machine while anybody may call: listen on 127.0.0.1, "
                    "or ask for API keys (DYN_API_KEYS_FILE)."
                )
            self.admit(headers)
