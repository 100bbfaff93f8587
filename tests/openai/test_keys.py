"""API keys: the file's form and mode, the check, and reloading."""

import os
from pathlib import Path

import pytest

from holdfast.base.errors import Unauthenticated
from holdfast.openai.keys import KeyFileUnusable, KeyRing


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", "# team a\nalpha\n\n  beta  \n")


def test_known_keys_pass(path: Path) -> None:
    ring = KeyRing(path)
    assert len(ring) == 2
    for value in (b"Bearer alpha", b"bearer beta", b"  BEARER   alpha  "):
        ring.check(value)


@pytest.mark.parametrize(
    "value",
    [None, b"", b"alpha", b"Bearer", b"Bearer ", b"Basic alpha", b"Bearer alph", b"Bearer alphaa", b"Bearer # team a"],
)
def test_others_do_not(path: Path, value: bytes | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        KeyRing(path).check(value)
    assert caught.value.status == 401
    assert "alph" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602])
def test_a_file_for_everybody_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(KeyFileUnusable, match="chmod 600"):
        KeyRing(path)


def test_a_file_for_the_group_is_warned_about(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.chmod(0o640)
    KeyRing(path)
    assert "0640" in caplog.text
    assert "alpha" not in caplog.text


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(KeyFileUnusable, match="can't be read"):
        KeyRing(tmp_path / "none")
    with pytest.raises(KeyFileUnusable, match="holds no key"):
        KeyRing(write(tmp_path / "empty", "# only words\n\n"))
    with pytest.raises(KeyFileUnusable):
        KeyRing(tmp_path)


def test_keys_change_with_the_file(path: Path) -> None:
    ring = KeyRing(path)
    assert not ring.refresh()
    replacement = write(path.with_name("new"), "gamma\n")
    os.replace(replacement, path)  # noqa: PTH105 - what a secret's volume does
    assert ring.refresh()
    assert not ring.refresh()
    ring.check(b"Bearer gamma")
    with pytest.raises(Unauthenticated):
        ring.check(b"Bearer alpha")


def test_old_keys_stay_when_the_new_file_is_unusable(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(path)
    write(path, "", 0o600)
    assert not ring.refresh()
    ring.check(b"Bearer alpha")
    path.unlink()
    assert not ring.refresh()
    ring.check(b"Bearer beta")
    assert "the 2 old ones stay in force" in caplog.text
