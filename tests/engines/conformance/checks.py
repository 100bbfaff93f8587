"""All checks, in the order in which they are run; importing this registers them."""

from tests.engines.conformance import accounting, life, limits, restart
from tests.engines.conformance.registry import CHECKS, NotApplicable, named

__all__ = ["CHECKS", "NotApplicable", "accounting", "life", "limits", "named", "restart"]
