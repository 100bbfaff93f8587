"""Classes of waiting requests, as the reference's policy file describes them, and which of them a request belongs to.

A file has a profile for all models, profiles of single models (which replace it as a whole), or both. A profile is a
matrix: the *family* that a request names (header ``x-dynamo-meta-policy-class``; ``default_policy_family`` where it
names none that is known) and the *bucket* of the tokens that would have to be computed for it select one class. A class
without family and bucket is selected by its own name alone.

Must never wait, count who waits, or know a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.routing.router_config import QueuePolicy
from holdfast.routing.saturation import Thresholds

DEFAULT_BUSY_FRAC = 16.0
"""Of ``max_num_batched_tokens``: when a worker is busy for a class that does not say so itself."""
_KNOB = "DYN_ROUTER_POLICY_CONFIG"

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that leave at least so many tokens to be computed."""

    min_tokens: _Count
    bucket: Name


class PolicyClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One class: its order, its share, when it waits, and how many may wait. Limits: per worker, None: none."""

    name: Name
    quantum: Annotated[int, msgspec.Meta(ge=1)]
    """Tokens to compute that it earns in each round: its weight among the classes that wait."""
    policy_family: Name | None = None
    cache_bucket: Name | None = None
    queue_policy: QueuePolicy = "fcfs"
    prefill_busy_threshold: _Count | None = None
    prefill_busy_threshold_frac: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """A worker is busy for the class over either of them; neither: `DEFAULT_BUSY_FRAC`."""
    request_queue_limit_per_worker: _Count | None = None
    raw_isl_token_queue_limit_per_worker: _Count | None = None
    cached_token_queue_limit_per_worker: _Count | None = None

    def thresholds(self, base: Thresholds) -> Thresholds:
        """Return those of the model with its own in place of the ones about prompt tokens."""
        frac = self.prefill_busy_threshold_frac
        if frac is None and self.prefill_busy_threshold is None:
            frac = DEFAULT_BUSY_FRAC
        return msgspec.structs.replace(
            base,
            active_prefill_tokens_threshold=self.prefill_busy_threshold,
            active_prefill_tokens_threshold_frac=frac,
        )


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The classes of one model, or of all that have no profile of their own."""

    default_policy_family: Name
    uncached_isl_buckets: tuple[Bucket, ...]
    policy_classes: tuple[PolicyClass, ...]

    def classify(self, requested: str, uncached: int) -> PolicyClass:
        """Return a request's class.

        Args:
            requested: the family or class that it names; empty: none.
            uncached: tokens that the best cache would leave to be computed.
        """
        families = set()
        for one in self.policy_classes:
            if one.policy_family is None and one.name == requested:
                return one
            families.add(one.policy_family)
        family = requested if requested in families else self.default_policy_family
        bucket = max((b for b in self.uncached_isl_buckets if b.min_tokens <= uncached), key=lambda b: b.min_tokens)
        return next(c for c in self.policy_classes if (c.policy_family, c.cache_bucket) == (family, bucket.bucket))


class PolicyClasses(msgspec.Struct, frozen=True):
    """All profiles of a file."""

    root: Profile | None
    models: Mapping[str, Profile]

    def of(self, model: str) -> Profile | None:
        """Return a model's profile; None: its requests have no classes."""
        return self.models.get(model, self.root)


def policy_classes(path: str) -> PolicyClasses | None:
    """Return what a file says; None for no file.

    Args:
        path: YAML (where PyYAML is installed) or JSON, which YAML includes; empty: none.

    Raises:
        InvalidRequest: it cannot be read, or means nothing; the message says what and where.
    """
    if not path:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it cannot be read: {error}") from None
    return parsed(_decoded(path, text), path)


def parsed(content: Any, path: str = "policy classes") -> PolicyClasses:
    """Return what the content of a file means. Raises InvalidRequest."""
    if not isinstance(content, dict):
        raise _wrong(path, "it is not a mapping")
    content = dict(content)
    models = content.pop("models", None) or {}
    if not isinstance(models, dict) or not (content or models):
        raise _wrong(path, "it defines no profile: default_policy_family, uncached_isl_buckets and policy_classes")
    root = _profile(path, "the root profile", content) if content else None
    return PolicyClasses(root, {str(name): _profile(path, f"model '{name}'", one) for name, one in models.items()})


def _decoded(path: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        pass
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415  only needed with such a file
    except ImportError:
        raise _wrong(path, "it is not JSON, and YAML needs PyYAML: pip install pyyaml, or write it as JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _wrong(path, f"it is not YAML: {error}") from None


def _profile(path: str, where: str, content: Any) -> Profile:
    try:
        profile = msgspec.convert(content, Profile)
    except msgspec.ValidationError as error:
        raise _wrong(path, f"{where}: {error}") from None
    for problem, check in _CHECKS.items():
        if not check(profile):
            raise _wrong(path, f"{where}: {problem}")
    return profile


def _wrong(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{_KNOB}: {path}: {why}.", param=_KNOB)


def _floors(profile: Profile) -> bool:
    floors = [one.min_tokens for one in profile.uncached_isl_buckets]
    return bool(floors) and floors[0] == 0 and all(a < b for a, b in pairwise(floors))


def _names(profile: Profile) -> bool:
    names = [one.name for one in profile.policy_classes]
    buckets = [one.bucket for one in profile.uncached_isl_buckets]
    return len(set(names)) == len(names) > 0 and len(set(buckets)) == len(buckets)


def _pairs(profile: Profile) -> bool:
    return all((one.policy_family is None) == (one.cache_bucket is None) for one in profile.policy_classes)


def _matrix(profile: Profile) -> bool:
    buckets = {one.bucket for one in profile.uncached_isl_buckets}
    cells = [(one.policy_family, one.cache_bucket) for one in profile.policy_classes if one.policy_family is not None]
    wanted = {(family, bucket) for family, _ in cells for bucket in buckets}
    return len(cells) == len(set(cells)) and set(cells) == wanted


def _default(profile: Profile) -> bool:
    return any(one.policy_family == profile.default_policy_family for one in profile.policy_classes)


def _apart(profile: Profile) -> bool:
    families = {one.policy_family for one in profile.policy_classes}
    return not any(one.policy_family is None and one.name in families for one in profile.policy_classes)


_CHECKS: Mapping[str, Callable[[Profile], bool]] = {
    "min_tokens of uncached_isl_buckets must begin at 0 and grow": _floors,
    "there must be classes, and names of classes and buckets must differ": _names,
    "a class has both policy_family and cache_bucket, or neither": _pairs,
    "each family needs exactly one class for each bucket": _matrix,
    "default_policy_family names no family of policy_classes": _default,
    "a class without family is named like a family": _apart,
}
