"""Stand-in: where a request shall run."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class SchedulingParams:
    """Data-parallel rank."""

    attention_dp_rank: int | None = None
    attention_dp_relax: bool = True
