"""Settings of the routing decision, under the reference's names. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting
from holdfast.routing.cost import DECODE_LOAD_SCALE, RECOMPUTE_WEIGHT, Weights

QueuePolicy = Literal["fcfs", "wspt", "lcfs"]


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--router-mode kv`` weighs, and what holds in every mode. Times in seconds."""

    overlap_score_weight: Annotated[
        float,
        setting(
            "DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT",
            "Weight of the prefill part of a worker's cost; 0: only decode blocks count.",
            aliases=("DYN_KV_OVERLAP_SCORE_WEIGHT",),
            flag="kv-overlap-score-weight",
            ge=0,
        ),
    ] = 1.0
    overlap_score_credit: Annotated[
        float,
        setting(
            "DYN_ROUTER_OVERLAP_SCORE_CREDIT",
            "Share of the cached blocks that counts as done already; 0: caches do not matter.",
            flag="router-overlap-score-credit",
            ge=0,
        ),
    ] = 1.0
    overlap_score_credit_decay: Annotated[
        float,
        setting(
            "DYN_ROUTER_OVERLAP_SCORE_CREDIT_DECAY",
            "How fast credit fades on workers with more prefill in hand than the least loaded one.",
            flag="router-overlap-score-credit-decay",
            ge=0,
        ),
    ] = 0.0
    prefill_load_scale: Annotated[
        float,
        setting(
            "DYN_ROUTER_PREFILL_LOAD_SCALE",
            "The newer name of the weight of the prefill part; both multiply.",
            flag="router-prefill-load-scale",
            ge=0,
        ),
    ] = 1.0
    decode_load_scale: Annotated[
        float,
        setting(
            "DYN_ROUTER_DECODE_LOAD_SCALE",
            "What a block in use counts beside one to be computed; 1: as in the reference.",
            flag="router-decode-load-scale",
            ge=0,
        ),
    ] = DECODE_LOAD_SCALE
    decode_active_request_weight: Annotated[
        float,
        setting(
            "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
            "Blocks that each request in hand costs a worker on top.",
            flag="router-decode-active-request-weight",
            ge=0,
        ),
    ] = 0.0
    host_cache_hit_weight: Annotated[
        float,
        setting(
            "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT",
            "Credit for a block in host memory.",
            flag="router-host-cache-hit-weight",
            ge=0,
        ),
    ] = 0.75
    disk_cache_hit_weight: Annotated[
        float,
        setting(
            "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT",
            "Credit for a block on disk.",
            flag="router-disk-cache-hit-weight",
            ge=0,
        ),
    ] = 0.25
    recompute_weight: Annotated[
        float,
        setting(
            "DYN_ROUTER_RECOMPUTE_WEIGHT",
            "What a block counts on top that another worker holds and this one would compute again; 0: as in the "
            "reference.",
            flag="router-recompute-weight",
            ge=0,
        ),
    ] = RECOMPUTE_WEIGHT
    router_temperature: Annotated[
        float, setting("DYN_ROUTER_TEMPERATURE", "0: the least cost; above: by chance, the more evenly.", ge=0)
    ] = 0.0
    router_track_active_blocks: Annotated[
        bool, setting("DYN_ROUTER_TRACK_ACTIVE_BLOCKS", "Whether blocks in use count.")
    ] = True
    router_track_output_blocks: Annotated[
        bool,
        setting(
            "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
            "Whether blocks that answers grow into count between two reports of their worker, too, and those of an "
            "answer near the end that its client announced (agent_hints.osl) count less.",
        ),
    ] = False
    router_track_prefill_tokens: Annotated[
        bool, setting("DYN_ROUTER_TRACK_PREFILL_TOKENS", "Whether prompt tokens still to compute count.")
    ] = True
    router_assume_kv_reuse: Annotated[
        bool,
        setting("DYN_ROUTER_ASSUME_KV_REUSE", "Whether blocks that requests of ours share count once on a worker."),
    ] = True
    router_template_tokens: Annotated[
        int,
        setting(
            "DYN_ROUTER_TEMPLATE_TOKENS",
            "A prefix that many prompts continue differently earns no credit while it is no longer than this for each "
            "of them, so that idle workers share new conversations; 0: every cached block earns credit.",
            ge=0,
        ),
    ] = 1024
    router_queue_threshold: Annotated[
        float | None,
        setting(
            "DYN_ROUTER_QUEUE_THRESHOLD",
            "Requests wait while every worker has more prompt tokens to compute than this times its "
            "max_num_batched_tokens; not set: they do not.",
            ge=0,
        ),
    ] = None
    router_queue_policy: Annotated[
        QueuePolicy,
        setting(
            "DYN_ROUTER_QUEUE_POLICY",
            "Order of those that wait: fcfs, wspt (few tokens to compute go first), or lcfs (the last goes first; for "
            "comparisons only, the first ones may wait until their time is over).",
        ),
    ] = "fcfs"
    router_policy_config: Annotated[
        str,
        setting(
            "DYN_ROUTER_POLICY_CONFIG",
            "File (YAML or JSON) of policy classes: waiting requests in lanes of their own, with weights, thresholds "
            "and limits; not set: one line for each model.",
        ),
    ] = ""
    shared_cache_multiplier: Annotated[
        float | None,
        setting(
            "DYN_SHARED_CACHE_MULTIPLIER",
            "Credit for a block in a cache that workers share: accepted without effect, with a warning, as there is "
            "none here.",
            ge=0,
        ),
    ] = None
    shared_cache_type: Annotated[
        Literal["none", "hicache"],
        setting("DYN_SHARED_CACHE_TYPE", "Which such cache there is: hicache is accepted without effect, likewise."),
    ] = "none"
    router_session_affinity_ttl_secs: Annotated[
        int | None,
        setting(
            "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
            "Requests of one session go to one worker for this long after the last; not set: sessions do not matter.",
            ge=1,
            le=31_536_000,
        ),
    ] = None
    router_session_affinity_mode: Annotated[
        Literal["hard", "soft"],
        setting(
            "DYN_ROUTER_SESSION_AFFINITY_MODE",
            "hard: they wait for that worker; soft: another one takes over when it has no room.",
        ),
    ] = "soft"

    @property
    def weights(self) -> Weights:
        """The parameters of the cost."""
        return Weights(**{name: getattr(self, name) for name in Weights.__struct_fields__})
