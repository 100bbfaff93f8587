"""Every planted bug is noticed by the oracle that has to notice it, and without it the same universes are quiet.

The universe in which a bug was noticed first is written down (`mutations/first_seeds.json`); when that one is quiet,
because the tree has changed, the search begins at seed 0 again. `make mutations` looks for all of them thoroughly.
"""

from __future__ import annotations

import pytest

from holdfast.sim.plan import Shape
from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.catalogue import BUGS
from tests.sim.mutations.hunt import first_sighting, judged
from tests.sim.mutations.ledger import first_seeds
from tests.sim.mutations.planting import Moved, change, planted, replacements
from tests.sim.mutations.unseen import UNSEEN, Unseen

KNOWN = first_seeds()


def test_there_are_enough_bugs_for_every_promise() -> None:
    assert len(BUGS) >= 30
    assert {f"P{number}" for number in range(1, 14)} <= {bug.caught_by[0] for bug in BUGS.values()}


@pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))
def test_a_planted_bug_is_noticed(bug: Bug) -> None:
    seeds = [KNOWN[bug.name]] if bug.name in KNOWN else []
    known = first_sighting(bug, seeds)
    found = known or first_sighting(bug, range(bug.within))
    assert found is not None, f"{bug.name} was not noticed by {', '.join(bug.caught_by)} in {bug.within} universes"


QUIET = {(KNOWN[name], bug.shape): name for name, bug in BUGS.items() if name in KNOWN}


@pytest.mark.parametrize(("seed", "shape"), QUIET, ids=list(QUIET.values()))
def test_the_same_universes_are_quiet_without_a_bug(seed: int, shape: Shape) -> None:
    assert judged(seed, shape).first == ""


@pytest.mark.parametrize("bug", UNSEEN, ids=lambda bug: bug.name)
def test_what_nobody_notices_is_still_a_bug_of_this_code(bug: Unseen) -> None:
    assert replacements(bug.edits)


# -- planting ------------------------------------------------------------------------------------------

_SUCCEEDED = """
         self.failures = 0
-        self.until = float("-inf")
+        self.until = 7.0

     def answered(self) -> None:
"""


def test_a_bug_is_planted_for_a_while_only() -> None:
    from holdfast.runtime.inhibition import Inhibition, InhibitionSettings  # noqa: PLC0415

    inhibition = Inhibition(InhibitionSettings())
    succeeded = inhibition.succeeded
    with planted([change("runtime.inhibition", _SUCCEEDED)]):
        succeeded()
        assert inhibition.until == 7.0
    succeeded()
    assert inhibition.until == float("-inf")


@pytest.mark.parametrize(
    "diff",
    [
        "\n-        this is not there\n",
        "\n-    duration: float = 5.0\n+    duration: float = 6.0\n",
        "\n         self.failures = 0\n",
    ],
    ids=["not there", "not in a function", "no change"],
)
def test_a_bug_whose_place_has_moved_is_refused(diff: str) -> None:
    with pytest.raises(Moved):
        replacements([change("runtime.inhibition", diff)])
