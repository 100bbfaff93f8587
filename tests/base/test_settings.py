"""Settings: precedence, conversion, messages, origins, masking and near misses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from holdfast.base import settings
from holdfast.base.settings import InvalidSetting, Origin, fields_of, load, near_misses, setting


class Limits(msgspec.Struct, frozen=True):
    migration_limit: Annotated[int, setting("DYN_MIGRATION_LIMIT", "Moves per request.", ge=0)] = 3
    wait_secs: Annotated[float | None, setting("DYN_WAIT", "Seconds to wait.", gt=0, aliases=("DYN_OLD_WAIT",))] = None


class Config(msgspec.Struct, frozen=True):
    http_port: Annotated[int, setting("DYN_HTTP_PORT", "Port.", ge=0, le=65535)] = 8000
    mode: Annotated[Literal["kv", "random"], setting("DYN_ROUTER_MODE", "Routing.", flag="router-mode")] = "kv"
    verbose: Annotated[bool, setting("DYN_VERBOSE", "Talk.")] = False
    models: Annotated[tuple[str, ...], setting("DYN_MODELS", "Names.")] = ()
    token: Annotated[str | None, setting("DYN_TOKEN", "Key.", secret=True)] = None
    directory: Annotated[Path | None, setting("DYN_DIR", "Directory.")] = None
    limits: Limits = Limits()


def test_defaults_are_what_the_struct_says() -> None:
    loaded = load(Config, {}, {})
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {Origin("default")}


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text('http-port = 1\nmigration_limit = 1\nverbose = true\n[frontend]\nmode = "random"\n')
    env = {"DYN_HTTP_PORT": "2", "DYN_MIGRATION_LIMIT": "2"}
    loaded = load(Config, {"http_port": "3", "mode": None}, env, file, section="frontend")
    assert loaded.config.http_port == 3
    assert loaded.config.limits.migration_limit == 2
    assert loaded.config.verbose is True
    assert loaded.config.mode == "random"
    assert [loaded.origins[k].source for k in ("http_port", "migration_limit", "verbose", "models")] == [
        "flag",
        "environment",
        "file",
        "default",
    ]
    assert str(loaded.origins["http_port"]) == "flag --http-port"
    assert loaded.origins["migration_limit"].name == "DYN_MIGRATION_LIMIT"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1", True),
        ("TRUE", True),
        ("on", True),
        ("yes", True),
        ("0", False),
        ("False", False),
        ("off", False),
        ("no", False),
    ],
)
def test_switches_take_the_usual_words(word: str, value: bool) -> None:
    assert load(Config, {}, {"DYN_VERBOSE": word}).config.verbose is value


def test_an_alias_is_honoured_after_the_variable_itself() -> None:
    assert load(Config, {}, {"DYN_OLD_WAIT": "2.5"}).config.limits.wait_secs == 2.5
    assert load(Config, {}, {"DYN_OLD_WAIT": "2.5", "DYN_WAIT": "4"}).config.limits.wait_secs == 4


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(Config, {}, {"DYN_HTTP_PORT": ""}).origins["http_port"].source == "default"


def test_lists_and_paths_are_converted() -> None:
    env = {"DYN_MODELS": "a, b", "DYN_DIR": "/x/y"}
    config = load(Config, {}, env).config
    assert config.models == ("a", "b")
    assert config.directory == Path("/x/y")
    assert load(Config, {}, {"DYN_MODELS": '["a,b"]'}).config.models == ("a,b",)


def test_an_error_names_every_variable_value_and_expectation() -> None:
    env = {"DYN_HTTP_PORT": "80x", "DYN_ROUTER_MODE": "best", "DYN_VERBOSE": "maybe", "DYN_MIGRATION_LIMIT": "-1"}
    with pytest.raises(InvalidSetting) as caught:
        load(Config, {}, env)
    text = caught.value.message
    assert "DYN_HTTP_PORT='80x': expected a whole number ≥ 0 and ≤ 65535" in text
    assert "DYN_ROUTER_MODE='best': expected one of kv, random" in text
    assert "DYN_VERBOSE='maybe': expected true or false" in text
    assert "DYN_MIGRATION_LIMIT='-1': expected a whole number ≥ 0" in text


def test_a_wrong_flag_is_named_as_the_flag() -> None:
    with pytest.raises(InvalidSetting, match=r"--router-mode='best'"):
        load(Config, {"mode": "best"}, {})


def test_a_missing_or_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read"):
        load(Config, {}, {}, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(InvalidSetting, match="is not TOML"):
        load(Config, {}, {}, broken)


def test_secrets_are_masked_even_in_errors() -> None:
    class Secretive(msgspec.Struct, frozen=True):
        pin: Annotated[int, setting("DYN_PIN", "Pin.", secret=True)] = 0

    loaded = load(Config, {}, {"DYN_TOKEN": "hush"})
    shown = {f.name: loaded.shown(f) for f in loaded.fields}
    assert shown["token"] == settings.MASK
    assert shown["http_port"] == "8000"
    assert shown["directory"] == "(none)"
    with pytest.raises(InvalidSetting) as caught:
        load(Secretive, {}, {"DYN_PIN": "hush"})
    assert "hush" not in caught.value.message


def test_groups_are_flattened_and_described() -> None:
    by_name = {f.name: f for f in fields_of(Config)}
    assert by_name["migration_limit"].path == ("limits", "migration_limit")
    assert by_name["migration_limit"].flag == "migration-limit"
    assert by_name["mode"].flag == "router-mode"
    assert by_name["mode"].choices == ("kv", "random")
    assert by_name["verbose"].is_bool


def test_two_settings_of_one_variable_are_refused() -> None:
    class Twice(msgspec.Struct, frozen=True):
        a: Annotated[int, setting("DYN_A", "A.")] = 1
        b: Annotated[int, setting("DYN_A", "B.")] = 1

    with pytest.raises(TypeError, match="share the env 'DYN_A'"):
        fields_of(Twice)


def test_values_survive_rendering() -> None:
    values = {"http_port": 9, "verbose": True, "models": ("a", "b"), "directory": Path("/d"), "wait_secs": 0.5}
    texts = {k: settings.render(v) for k, v in values.items()}
    config = load(Config, texts, {}).config
    assert (config.http_port, config.verbose, config.models) == (9, True, ("a", "b"))
    assert (config.directory, config.limits.wait_secs) == (Path("/d"), 0.5)


def test_near_misses_name_the_variable_that_was_meant() -> None:
    known = [f.env for f in fields_of(Config)]
    env = ["DYN_MIGRATON_LIMIT", "DYN_HTTP_PORT", "DYN_SOMETHING_ELSE", "PATH"]
    assert near_misses(env, known) == ["DYN_MIGRATON_LIMIT: did you mean DYN_MIGRATION_LIMIT?"]
    assert settings.unknown_names(env, known) == ["DYN_MIGRATON_LIMIT", "DYN_SOMETHING_ELSE"]


def test_what_several_processes_share_comes_after_their_own_settings() -> None:
    class Special(Limits, frozen=True):
        speed: Annotated[int, setting("DYN_SPEED", "How fast.")] = 1

    assert [f.name for f in fields_of(Special)] == ["speed", "migration_limit", "wait_secs"]
    assert load(Special, {}, {"DYN_SPEED": "2", "DYN_WAIT": "3"}).config == Special(speed=2, wait_secs=3.0)
