"""Settings of the reference that do nothing here are accepted, and whoever sets one is told."""

from __future__ import annotations

import pytest

from holdfast.base.settings import InvalidSetting, load
from holdfast.routing.absent import without_effect
from holdfast.routing.cost import Weights
from holdfast.routing.router_config import RouterSettings


def test_nobody_is_told_of_what_he_did_not_set() -> None:
    assert without_effect(RouterSettings()) == []
    assert without_effect(RouterSettings(shared_cache_multiplier=0.0)) == [], "off is off here, too"


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("DYN_SHARED_CACHE_MULTIPLIER", "0.5", "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT"),
        ("DYN_SHARED_CACHE_TYPE", "hicache", "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT"),
    ],
)
def test_the_names_are_taken_and_the_warning_says_what_there_is_instead(name: str, value: str, instead: str) -> None:
    settings = load(RouterSettings, {}, env={name: value}).config
    (warning,) = without_effect(settings)
    assert warning.startswith(f"{name} is set to {value} and has no effect")
    assert instead in warning
    assert settings.weights == Weights(), "and the cost is what it was"


def test_a_value_that_the_reference_would_not_take_either_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="DYN_SHARED_CACHE_TYPE"):
        load(RouterSettings, {}, env={"DYN_SHARED_CACHE_TYPE": "mooncake"})
