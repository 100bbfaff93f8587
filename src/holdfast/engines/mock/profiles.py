"""Named parameter sets of the mock engine: how fast and how large a real model on a real GPU is.

Sizes are per engine (all its GPUs together). The step models are sums of physical terms, fitted to published rows of
measured hardware; ``python -m bench.mock_fidelity`` replays those rows and prints the error of each.

Must never hold behaviour beyond looking up and filling in.
"""

from __future__ import annotations

import msgspec

from holdfast.engines.mock.config import MockConfig, ProfileName
from holdfast.engines.mock.timing import Experts, StepModel


class Profile(msgspec.Struct, frozen=True):
    """One parameter set."""

    source: str
    """Where the figures come from."""
    model: StepModel | None = None
    """What a step takes; None: the polynomials in `timing`."""
    gpus: int = 1
    """GPUs of one engine, for figures per GPU."""
    sizes: dict[str, int | float] = {}
    """Values for settings of `MockConfig` that are left at their defaults."""


_KV_WATERMARK = 0.01

PROFILES: dict[ProfileName, Profile] = {
    "default": Profile(source="the polynomials of the reference's mock engine; every size is its own setting"),
    "reference": Profile(
        source="the reference's mock engine as it ships: its polynomials, blocks of 64 tokens and a watermark of 1 %",
        sizes={
            "block_size": 64,
            "num_blocks": 16_384,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "context_length": 131_072,
            "watermark": _KV_WATERMARK,
        },
    ),
    "h100-qwen3-32b-tp2": Profile(
        source="Qwen3-32B (BF16) on two H100, 1,024 tokens in and out, concurrency 8 to 128: the published rows that "
        "simulators of serving are checked against. KV cache: 2 x 80 GB x 0.9 less 66 GB of weights and 6 GB of "
        "activations, 262,144 bytes a token.",
        gpus=2,
        model=StepModel(base_ms=14.32, sequence_ms=0.047, context_ns=43.0, prefill_us=74.0, pair_ns=5.0),
        sizes={
            "block_size": 64,
            "num_blocks": 4_200,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "context_length": 131_072,
        },
    ),
    "b200-minimax-m2.5-fp8-tp4": Profile(
        source="MiniMax-M2.5 (FP8, 256 experts of which 8 are read for a token) on four B200, 1,024 tokens in and "
        "out, concurrency 4 to 64: the published rows that simulators of serving are checked against. KV cache: "
        "4 x 180 GB x 0.9 less 230 GB of weights and 20 GB of activations, 126,976 bytes a token.",
        gpus=4,
        model=StepModel(
            base_ms=7.8,
            sequence_ms=0.007,
            context_ns=6.0,
            prefill_us=41.7,
            pair_ns=2.0,
            experts=Experts(count=256, chosen=8, all_ms=10.4),
        ),
        sizes={
            "block_size": 64,
            "num_blocks": 48_000,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "context_length": 131_072,
        },
    ),
}


def applied(config: MockConfig) -> MockConfig:
    """Return the settings with the profile's sizes in place of those that stand at their defaults."""
    defaults = MockConfig()
    sizes = PROFILES[config.profile].sizes
    changes = {name: value for name, value in sizes.items() if getattr(config, name) == getattr(defaults, name)}
    return msgspec.structs.replace(config, **changes) if changes else config
