"""Policy classes: what a file means, which class a request belongs to, and that nonsense is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.routing.policy_classes import DEFAULT_BUSY_FRAC, parsed, policy_classes
from holdfast.routing.saturation import Thresholds


def one(name: str, family: str | None = None, bucket: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "policy_family": family, "cache_bucket": bucket, "quantum": 1000, **more}


def profile(**changes: Any) -> dict[str, Any]:
    return {
        "default_policy_family": "batch",
        "uncached_isl_buckets": [{"min_tokens": 0, "bucket": "warm"}, {"min_tokens": 500, "bucket": "cold"}],
        "policy_classes": [
            one("chat_warm", "chat", "warm", quantum=4000),
            one("chat_cold", "chat", "cold", queue_policy="wspt"),
            one("batch_warm", "batch", "warm"),
            one("batch_cold", "batch", "cold"),
            one("vip"),
        ],
        **changes,
    }


@pytest.mark.parametrize(
    ("requested", "uncached", "name"),
    [
        ("chat", 0, "chat_warm"),
        ("chat", 499, "chat_warm"),
        ("chat", 500, "chat_cold"),
        ("batch", 10_000, "batch_cold"),
        ("", 3, "batch_warm"),
        ("unheard-of", 3, "batch_warm"),
        ("chat_warm", 10_000, "batch_cold"),
        ("vip", 10_000, "vip"),
    ],
)
def test_family_and_bucket_select_a_class(requested: str, uncached: int, name: str) -> None:
    """A class of the matrix cannot be named directly: nobody gets past the buckets."""
    found = parsed(profile()).of("m")
    assert found is not None
    assert found.classify(requested, uncached).name == name


def test_a_models_own_profile_replaces_the_root_as_a_whole() -> None:
    own = {
        "default_policy_family": "all",
        "uncached_isl_buckets": [{"min_tokens": 0, "bucket": "any"}],
        "policy_classes": [one("only", "all", "any")],
    }
    both = parsed(profile(models={"m": own}))
    assert both.of("m").classify("chat", 9).name == "only"  # type: ignore[union-attr]
    assert both.of("other").classify("chat", 9).name == "chat_warm"  # type: ignore[union-attr]
    assert parsed({"models": {"m": own}}).of("other") is None


def test_thresholds_of_a_class_replace_those_about_prompt_tokens() -> None:
    base = Thresholds(0.9, 100, 2.0)
    found = parsed(
        profile(policy_classes=[one("w", "batch", "warm"), one("c", "batch", "cold", prefill_busy_threshold=7)])
    ).of("m")
    assert found is not None
    warm, cold = found.policy_classes
    assert warm.thresholds(base) == Thresholds(0.9, None, DEFAULT_BUSY_FRAC)
    assert cold.thresholds(base) == Thresholds(0.9, 7, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"uncached_isl_buckets": [{"min_tokens": 1, "bucket": "warm"}]}, "begin at 0"),
        ({"uncached_isl_buckets": [{"min_tokens": 0, "bucket": "a"}, {"min_tokens": 0, "bucket": "b"}]}, "and grow"),
        ({"policy_classes": []}, "there must be classes"),
        ({"policy_classes": [one("a", "batch", "warm"), one("a", "batch", "cold")]}, "names of classes"),
        ({"policy_classes": [one("a", "batch", "warm"), one("b", "batch")]}, "both policy_family and cache_bucket"),
        ({"policy_classes": [one("a", "batch", "warm")]}, "exactly one class for each bucket"),
        ({"default_policy_family": "nobody"}, "names no family"),
        ({"policy_classes": [*profile()["policy_classes"], one("chat")]}, "named like a family"),
        ({"policy_classes": [one("a", "batch", "warm", quantum=0)]}, "quantum"),
        ({"policy_classes": [one("a", "batch", "warm", busy_worker_ratio=0.5)]}, "busy_worker_ratio"),
        ({"policy_classes": [one("a b", "batch", "warm")]}, "name"),
        ({"models": {"m": {}}}, "model 'm'"),
    ],
)
def test_nonsense_is_refused_and_says_what(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        parsed(profile(**changes), "classes.yaml")
    assert "DYN_ROUTER_POLICY_CONFIG: classes.yaml" in caught.value.message


@pytest.mark.parametrize("content", ["[]", "{}", "7"])
def test_a_file_must_define_something(content: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InvalidRequest):
        policy_classes(str(tmp_path / "classes.json"))


def test_files(tmp_path: Path) -> None:
    assert policy_classes("") is None
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(profile()))
    assert policy_classes(str(path)) == parsed(profile())
    with pytest.raises(InvalidRequest, match="cannot be read"):
        policy_classes(str(tmp_path / "missing.yaml"))


def test_yaml_or_what_to_do_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "default_policy_family: all\nuncached_isl_buckets:\n  - {min_tokens: 0, bucket: any}\n"
    text += "policy_classes:\n  - {name: only, policy_family: all, cache_bucket: any, quantum: 1}\n"
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(InvalidRequest, match="pip install pyyaml"):
        policy_classes(str(path))
    monkeypatch.undo()
    pytest.importorskip("yaml")
    found = policy_classes(str(path))
    assert found is not None
    assert found.of("m").classify("", 5).name == "only"  # type: ignore[union-attr]
    path.write_text("a: [")
    with pytest.raises(InvalidRequest, match="not YAML"):
        policy_classes(str(path))
