"""A simulated engine: real scheduling and KV bookkeeping, checkable tokens, misbehaviour on command."""

from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.engine import MockEngine

__all__ = ["MockConfig", "MockEngine"]
