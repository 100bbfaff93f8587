"""Settings of the worker process. Must never hold behaviour, and never load an engine."""

from __future__ import annotations

from typing import Annotated, Literal

from holdfast.base.settings import InvalidSetting, setting
from holdfast.engines.handoff import Role
from holdfast.health.config import CanaryConfig, SystemConfig
from holdfast.runtime.member_config import ListenerSettings
from holdfast.runtime.shutdown import ShutdownBudget
from holdfast.telemetry.spans import TraceSettings
from holdfast.worker.kv_config import KvPublishConfig
from holdfast.worker.lora_config import LoraConfig

EngineName = Literal["llamacpp", "mock", "sglang", "trtllm", "vllm"]
DisaggregationMode = Literal["agg", "prefill", "decode"]
BACKEND = "backend"
"""Component of every worker that serves streams."""


class WorkerConfig(ListenerSettings, frozen=True, kw_only=True):
    """Everything that `holdfast worker` can be told beside its engine's own settings. Times in seconds."""

    engine: Annotated[EngineName, setting("DYN_ENGINE", "Inference engine that this worker hosts.")] = "llamacpp"
    """Which engine to host; its own settings are a section of their own."""
    served_model_name: Annotated[
        str, setting("DYN_SERVED_MODEL_NAME", "Name under which the model is served; empty: the engine's own.")
    ] = ""
    """Name in the model card; empty: what the engine says."""
    model_aliases: Annotated[
        tuple[str, ...], setting("DYN_MODEL_ALIASES", "Further names of the model, separated by commas.")
    ] = ()
    """Further names under which clients may ask for the model."""
    taints: Annotated[
        tuple[str, ...],
        setting(
            "DYN_WORKER_TAINTS",
            "What requests may ask of a worker (nvext.router.routing_constraints), as key=value, separated by commas: "
            "dynamo.topology/zone=a, ….",
            flag="worker-taints",
        ),
    ] = ()
    """Topology, hardware: matched literally."""
    disaggregation_mode: Annotated[
        DisaggregationMode,
        setting(
            "DYN_DISAGGREGATION_MODE",
            "What this worker does of a request: agg (all of it), prefill (prompts only), or decode (the rest; and all "
            "of it while no prefill worker is there).",
        ),
    ] = "agg"
    """See `role`."""
    is_prefill_worker: Annotated[
        bool, setting("DYN_IS_PREFILL_WORKER", "The same as --disaggregation-mode prefill.")
    ] = False
    """The reference's older name."""
    is_decode_worker: Annotated[bool, setting("DYN_IS_DECODE_WORKER", "The same as --disaggregation-mode decode.")] = (
        False
    )
    """The reference's older name."""
    namespace: Annotated[str, setting("DYN_NAMESPACE", "Namespace that this worker belongs to.")] = "dynamo"
    """Frontends use the workers of their own namespace only."""
    component: Annotated[
        str, setting("DYN_COMPONENT", "Component name of this worker; prefill workers are prefill unless it is set.")
    ] = BACKEND
    """``backend`` for workers that do the whole of a request; prefill workers are ``prefill`` unless it is set."""
    advertise: Annotated[
        str,
        setting(
            "DYN_WORKER_ADVERTISE",
            "host:port (or host alone) that callers shall use instead of the one that is bound; "
            "empty: the bound one, or, bound to 0.0.0.0, the address of the default route.",
        ),
    ] = ""
    """For workers behind address translation; see `runtime.advertise`."""
    engine_request_limit: Annotated[
        int, setting("DYN_ENGINE_REQUEST_LIMIT", "Sequences accepted at once; 0: four times the engine's seats.", ge=0)
    ] = 0
    """More are refused as `WorkerSaturated`, so that another worker takes them."""
    prefill_hold: Annotated[
        float,
        setting(
            "DYN_PREFILL_HOLD_SECS",
            "A prefill worker keeps the blocks of a hand-off for this long when nobody says that they were taken.",
            gt=0,
        ),
    ] = 60.0
    """The backstop behind the caller's word and its connection."""
    engine_start_timeout: Annotated[
        float, setting("DYN_ENGINE_START_TIMEOUT_SECS", "Give up when the engine is not ready within this.", gt=0)
    ] = 1800.0
    """Loading and warming up together."""
    control: Annotated[bool, setting("DYN_WORKER_CONTROL", "Offer the engine's control endpoint (loopback only).")] = (
        True
    )
    """Only engines that can be commanded (mock) have one, and only on a loopback address."""
    system: SystemConfig = SystemConfig()
    """The status server."""
    health: CanaryConfig = CanaryConfig()
    """How the worker tests its own engine."""
    traces: TraceSettings = TraceSettings()
    """Where spans go."""
    kv_events: KvPublishConfig = KvPublishConfig()
    """What frontends are told about the KV cache."""
    lora: LoraConfig = LoraConfig()
    """Adapters."""
    shutdown: ShutdownBudget = ShutdownBudget()
    """How long leaving may take."""

    @property
    def published_component(self) -> str:
        """Component under which this worker is found."""
        return "prefill" if self.role == "prefill" and self.component == BACKEND else self.component

    @property
    def role(self) -> Role:
        """What this worker does of a request.

        Raises:
            InvalidSetting: the settings contradict each other.
        """
        said = {"prefill"} if self.is_prefill_worker else set()
        said |= {"decode"} if self.is_decode_worker else set()
        said |= {self.disaggregation_mode} if self.disaggregation_mode != "agg" else set()
        if len(said) > 1:
            raise InvalidSetting(
                "A worker is for prefill or for decode, not both: check DYN_DISAGGREGATION_MODE, DYN_IS_PREFILL_WORKER "
                "and DYN_IS_DECODE_WORKER."
            )
        return "prefill" if "prefill" in said else "decode" if said else "aggregated"
