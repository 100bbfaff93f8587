"""From Holdfast's settings and vLLM's own flags to vLLM's engine arguments.

vLLM's flags are parsed by vLLM's own parser, so that everything it knows can be said and its errors are its own words.
What Holdfast needs (events, statistics, transfer of blocks) is added where the flags say nothing about it.

Must never import vLLM at module level.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
from collections.abc import MutableMapping, Sequence
from typing import Any, NoReturn

from holdfast.base.settings import InvalidSetting
from holdfast.engines.handoff import Role
from holdfast.engines.vllm.config import VllmConfig

INSTALL_HINT = "Install it into the worker's environment: pip install 'holdfast[vllm]', or tools/install_vllm.sh."
TOPIC = "kv-events"
_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Unless they are set: nothing is reported to anybody; threads are not pinned, so that workers share a machine."""
_ALWAYS = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
"""Processes that are forked from one with threads may hang, and do not show the mark by which they are found
(`engines.orphans`): /proc has the environment that a program was started with."""


def words_of(config: VllmConfig) -> list[str]:
    """Return vLLM's command line. Raises InvalidSetting when it cannot be split, or no model is named."""
    try:
        words = shlex.split(config.args)
    except ValueError as error:
        raise InvalidSetting(f"DYN_VLLM_ARGS cannot be split into words: {error}.") from error
    if not config.model:
        raise InvalidSetting(
            "No model is named; give --model DIRECTORY (or DYN_VLLM_MODEL): a Hugging Face directory, or a name that "
            "is in the Hugging Face cache."
        )
    return ["--model", config.model, *words]


def prepare_environment(config: VllmConfig, role: Role, environ: MutableMapping[str, str]) -> None:
    """Set the variables that vLLM and its processes read; most of them unless they are set."""
    environ.update(_ALWAYS)
    for name, value in _ENVIRONMENT.items():
        environ.setdefault(name, value)
    if transfers(config, role):
        environ.setdefault(_HOST, config.nixl_host)
        if _PORT not in environ:
            environ[_PORT] = str(_free_port(config.nixl_host))


def _free_port(host: str) -> int:
    """Return a port that is free now; vLLM opens it much later, so it is looked for among those nobody is given."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def transfers(config: VllmConfig, role: Role) -> bool:
    """Whether this worker hands KV blocks over by NIXL."""
    return config.kv_transfer == "nixl" or (config.kv_transfer == "auto" and role != "aggregated")


def engine_arguments(config: VllmConfig, role: Role, endpoints: tuple[str, str]) -> Any:
    """Return ``AsyncEngineArgs``.

    Args:
        config: our settings.
        role: what the worker does of a request.
        endpoints: where vLLM shall publish KV events, and replay them.

    Raises:
        InvalidSetting: vLLM's parser refuses the flags; with its words.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415

    arguments = AsyncEngineArgs.from_cli_args(_parse(words_of(config), AsyncEngineArgs))
    arguments.disable_log_stats = True  # its own loggers; ours is told all the same
    arguments.enable_log_requests = False
    if wants_events(config, arguments):
        from vllm.config import KVEventsConfig  # noqa: PLC0415

        publish, replay = endpoints
        arguments.kv_events_config = KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint=publish, replay_endpoint=replay, topic=TOPIC
        )
    if transfers(config, role) and arguments.kv_transfer_config is None:
        arguments.kv_transfer_config = _nixl(config)
    return arguments


def wants_events(config: VllmConfig, arguments: Any) -> bool:
    """Whether vLLM shall publish KV events for us: not when it caches nothing, or its flags say something else."""
    return config.kv_events and arguments.enable_prefix_caching is not False and arguments.kv_events_config is None


def _nixl(config: VllmConfig) -> Any:
    from vllm.config import KVTransferConfig  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    if not _has_nixl():
        raise InvalidSetting(
            "Handing KV blocks over needs the package nixl, which is not installed: pip install nixl, or give "
            "--kv-transfer none."
        )
    device = {"kv_buffer_device": "cpu"} if current_platform.is_cpu() else {}
    return KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"kv_lease_duration": config.kv_lease},
        **device,
    )


def _has_nixl() -> bool:
    with contextlib.suppress(ImportError):
        import nixl  # noqa: F401, PLC0415

        return True
    return False


def _parse(words: Sequence[str], kind: Any) -> argparse.Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        """vLLM's parser, which raises instead of ending the process."""

        def error(self, message: str) -> NoReturn:
            raise InvalidSetting(f"vLLM refuses its flags: {message}. They are listed by: vllm serve --help=all")

    return kind.add_cli_args(Parser(prog="holdfast worker --engine vllm")).parse_args(list(words))  # type: ignore[no-any-return]


def set_environment(config: VllmConfig, role: Role) -> None:
    """Do as `prepare_environment`, in this process."""
    prepare_environment(config, role, os.environ)
