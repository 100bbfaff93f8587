"""How each real engine is set up for the proofs, and by what name its processes are found.

Must never start anything.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tests.engines.sglang import harness as sglang

Arrangement = Literal["aggregated", "split", "mixed"]
"""``aggregated``: two workers that do everything; ``split``: prompts are computed by a third one; ``mixed``: the long
prompts are, so that both ways are under way at once."""
Fault = Literal["core", "worker", "stop", "term", "prefill-core", "prefill-worker"]
WORDS: dict[Fault, str] = {
    "core": "SIGKILL to the engine's core",
    "worker": "SIGKILL to the worker",
    "stop": "SIGSTOP to the worker",
    "term": "SIGTERM to the worker",
    "prefill-core": "SIGKILL to the prefill engine's core",
    "prefill-worker": "SIGKILL to the prefill worker",
}
FAULTS: dict[Arrangement, tuple[Fault, ...]] = {
    "aggregated": ("stop", "core", "worker", "term"),
    "split": ("core", "worker", "prefill-core", "prefill-worker"),
    # whoever computes prompts is hurt while another one still starts, which saves a start
    "mixed": ("stop", "term", "prefill-core", "core", "prefill-worker", "worker"),
}
SHORT_TOKENS = 120
"""Prompts up to this length are computed where they are decoded, in the arrangement ``mixed``."""

_PREFILL, _DECODE = "--disaggregation-mode=prefill", "--disaggregation-mode=decode"
_COMMON = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0.5",  # or everything would finish where it is
}


class Kind(msgspec.Struct, frozen=True):
    """One engine."""

    flags: tuple[str, ...]
    workers: dict[Arrangement, tuple[tuple[str, ...], ...]]
    """Further flags of each worker; one that computes prompts for others comes last."""
    core: bytes
    """How the command line of the process begins without which it cannot work."""
    family: bytes
    """How those of all its processes begin."""
    env: dict[str, str]
    dtype: str
    """Of the stored weights; the arithmetic is float32."""
    package: str


_VLLM = Kind(
    flags=(
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--block-size", "32"),
        *("--num-gpu-blocks-override", "96", "--enforce-eager"),
    ),
    workers={
        "aggregated": ((), ()),
        "split": ((_DECODE,), (_DECODE,), (_PREFILL,)),
        "mixed": (("--kv-transfer", "nixl"), ("--kv-transfer", "nixl"), (_PREFILL,)),
    },
    core=b"VLLM::EngineCore",
    family=b"VLLM::",
    env={
        **_COMMON,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DYN_VLLM_MEMORY_WAIT_SECS": "20",
    },
    dtype="float32",
    package="vllm-cpu",
)
_NIXL = ("--disaggregation-transfer-backend", "nixl")
_SGLANG = Kind(
    flags=tuple(sglang.FLAGS.split()),
    workers={
        "aggregated": ((), ()),
        # its decode workers compute no prompts: while nobody computes them, streams go to the one without a role
        "split": ((_DECODE, *_NIXL, "--disaggregation-decode-retraction-backup", "cpu_tensor"), (), (_PREFILL, *_NIXL)),
    },
    core=b"sglang::scheduler",
    family=b"sglang::",
    env={**_COMMON, **sglang.ENVIRONMENT, **sglang.SLOW_MACHINE, "PYTHONPATH": sglang.search_path()},
    dtype="bfloat16",
    package="sglang",
)
KINDS: dict[str, Kind] = {"vllm": _VLLM, "sglang": _SGLANG}
