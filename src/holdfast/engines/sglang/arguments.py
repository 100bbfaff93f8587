"""From our settings and the flags that were passed through to SGLang's command line.

What comes later wins there: first what we would choose, then what the operator says, then what this adapter depends on.

Must never import SGLang.
"""

from __future__ import annotations

import json
import shlex
import socket

from holdfast.base.settings import InvalidSetting
from holdfast.engines.handoff import Role
from holdfast.engines.sglang.config import SglangConfig


def command_line(config: SglangConfig, model: str, role: Role, *, events: str, replay: str, port: int) -> list[str]:
    """Return the flags for ``sglang serve``.

    Args:
        config: settings.
        model: directory.
        role: of the worker.
        events: endpoint for KV events.
        replay: endpoint for asking for them again.
        port: where decode workers meet this one; 0 unless it is a prefill worker.

    Raises:
        InvalidSetting: the flags that are passed through cannot be split into words.
    """
    try:
        theirs = shlex.split(config.args)
    except ValueError as error:
        raise InvalidSetting(f"DYN_SGLANG_ARGS cannot be split into words: {error}.") from error
    ours = ["--model-path", model, "--page-size", str(config.page_size), "--log-level", "warning"]
    ours += [] if role == "aggregated" else ["--host", config.bootstrap_host]
    needed = ["--incremental-streaming-output", "--skip-server-warmup"]
    needed += [] if config.guided else ["--skip-tokenizer-init"]
    needed += ["--kv-events-config", _events(events, replay)]
    if role != "aggregated":
        needed += ["--disaggregation-mode", role]
    if port:
        needed += ["--disaggregation-bootstrap-port", str(port)]
    return [*ours, *theirs, *needed]


def free_port(host: str) -> int:
    """Return a TCP port of this machine that nobody listens on now."""
    with socket.create_server((host, 0)) as found:
        return int(found.getsockname()[1])


def _events(events: str, replay: str) -> str:
    """The form ``dynamo`` gives blocks of adapters and cache salts hashes of their own, and names the adapter."""
    return json.dumps(
        {
            "publisher": "zmq",
            "endpoint": events,
            "replay_endpoint": replay,
            "topic": "kv-events",
            "bind": True,
            "format": "dynamo",
        }
    )
