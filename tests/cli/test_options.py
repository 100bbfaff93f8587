"""Flags of the short way: forms, switches, mistakes, what is passed on to children."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from holdfast.base.settings import fields_of, setting
from holdfast.cli.catalogue import Section
from holdfast.cli.options import Flags, Process, UsageError, parse_flags, passed_on, run_guarded
from holdfast.local.backoff import EXIT_CONFIGURATION


class Config(msgspec.Struct, frozen=True):
    http_port: Annotated[int, setting("DYN_TEST_PORT", "Port.", ge=0)] = 8000
    colour: Annotated[bool, setting("DYN_TEST_COLOUR", "Colour.")] = True
    token: Annotated[str, setting("DYN_TEST_TOKEN", "Token.", secret=True)] = ""


FIELDS = fields_of(Config)
SECTION = Section("test", "Test", Config, FIELDS)


def test_values_switches_and_the_file() -> None:
    flags = parse_flags(["--http-port", "1", "--no-colour", "--token=a=b", "--config-file", "x.toml"], FIELDS)
    assert flags == Flags({"http-port": "1", "colour": "false", "token": "a=b"}, Path("x.toml"))
    assert parse_flags(["--colour"], FIELDS).values == {"colour": "true"}
    assert parse_flags(["--colour=off"], FIELDS).values == {"colour": "off"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--http-prot", "1"], r"no flag --http-prot. Did you mean --http-port\?"),
        (["--http-port"], "--http-port needs a value"),
        (["8000"], "unexpected argument '8000'"),
        (["--no-http-port"], "no flag --no-http-port"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_flags(argv, FIELDS)


def test_flags_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TEST_PORT", "5")
    monkeypatch.setenv("DYN_TEST_COLOUR", "no")
    loaded = Flags({"http-port": "6"}).load(Config, "test")
    assert loaded.config == Config(http_port=6, colour=False)
    assert loaded.origins["http_port"].source == "flag"


def test_the_file_may_come_by_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[test]\nhttp-port = 7\n")
    monkeypatch.setenv("DYN_CONFIG_FILE", str(file))
    assert Flags().load(Config, "test").config.http_port == 7


def test_children_get_flags_but_neither_secrets_nor_what_the_plan_decides() -> None:
    flags = Flags({"http-port": "1", "colour": "false", "token": "hush", "elsewhere": "x"}, Path("f.toml"))
    assert passed_on(flags, [SECTION], frozenset({"http-port"})) == ("--colour=false", "--config-file=f.toml")


def test_settings_that_can_never_work_exit_with_a_code_that_nobody_restarts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYN_TEST_PORT", "many")

    def run(flags: Flags) -> int:
        flags.load(Config, "test")
        return 0

    assert run_guarded(Process(("test",), run), Flags()) == EXIT_CONFIGURATION
    assert "DYN_TEST_PORT='many': expected a whole number ≥ 0" in capsys.readouterr().err
