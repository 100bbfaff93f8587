"""Content comes back as it went in, or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from holdfast.base.errors import PayloadTooLarge
from holdfast.base.limits import ARTIFACT_BYTES
from holdfast.models.card import Artifact, artifact_of
from holdfast.models.store import ArtifactStore


def test_memory_only() -> None:
    store = ArtifactStore()
    artifact = store.put(b"hello")
    assert artifact == Artifact(hashlib.sha256(b"hello").hexdigest(), 5)
    assert store.get(artifact) == b"hello"
    assert store.get(Artifact(artifact.sha256, 6)) is None
    assert store.get(artifact_of(b"other")) is None


def test_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    store = ArtifactStore(memory_bytes=300)
    first, second, third = (store.put(char * 100) for char in (b"a", b"b", b"c"))
    assert store.get(first) is not None
    store.put(b"d" * 100)
    assert store.get(second) is None
    assert store.get(first) is not None
    assert store.get(third) is not None
    huge = store.put(b"e" * 1_000)
    assert store.get(huge) is not None
    assert store.get(first) is None


def test_disk_survives_the_store_and_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "cache"
    artifact = ArtifactStore(directory).put(b"x" * 1_000)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [p.name for p in directory.iterdir()] == [artifact.sha256]
    assert stat.S_IMODE((directory / artifact.sha256).stat().st_mode) == 0o600
    assert ArtifactStore(directory).get(artifact) == b"x" * 1_000


@pytest.mark.parametrize("damage", [b"", b"y" * 1_000, b"x" * 999])
def test_corrupted_file_is_deleted_and_can_be_put_again(tmp_path: Path, damage: bytes) -> None:
    artifact = ArtifactStore(tmp_path / "c").put(b"x" * 1_000)
    path = tmp_path / "c" / artifact.sha256
    path.write_bytes(damage)
    store = ArtifactStore(tmp_path / "c")
    assert store.get(artifact) is None
    assert not path.exists()
    assert store.accept(artifact, b"x" * 1_000)
    assert path.read_bytes() == b"x" * 1_000


def test_content_from_a_peer_is_checked() -> None:
    store = ArtifactStore()
    artifact = artifact_of(b"right")
    assert not store.accept(artifact, b"wrong")
    assert not store.accept(Artifact(artifact.sha256, 4), b"right")
    assert store.get(artifact) is None
    assert store.accept(artifact, b"right")


def test_names_from_a_peer_never_leave_the_directory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store = ArtifactStore(tmp_path / "cache")
    for name in ("../secret", str(tmp_path / "secret"), "", ".", "A" * 64, "0" * 63 + "\n"):
        assert store.get(Artifact(name, 6)) is None
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_directory_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    store = ArtifactStore(directory)
    assert store.directory is None
    assert store.get(store.put(b"x")) == b"x"
    assert list(directory.iterdir()) == []
    blocked = ArtifactStore(tmp_path / "file" / "sub") if (tmp_path / "file").write_bytes(b"") == 0 else None
    assert blocked is not None
    assert blocked.directory is None


def test_disk_is_bounded(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "c", memory_bytes=1, disk_bytes=250)
    names = []
    for i, char in enumerate((b"a", b"b", b"c")):
        names.append(store.put(char * 100))
        os.utime(tmp_path / "c" / names[-1].sha256, (1_000 + i, 1_000 + i))
    last = store.put(b"d" * 100)
    left = {p.name for p in (tmp_path / "c").iterdir()}
    assert last.sha256 in left
    assert names[0].sha256 not in left
    assert len(left) == 2


def test_a_full_or_vanished_disk_costs_only_the_cache(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "c")
    (tmp_path / "c").rmdir()
    artifact = store.put(b"x")
    assert store.get(artifact) == b"x"


def test_too_large() -> None:
    with pytest.raises(PayloadTooLarge, match=str(ARTIFACT_BYTES)):
        ArtifactStore().put(bytes(ARTIFACT_BYTES + 1))


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    stores = [ArtifactStore(tmp_path / "c") for _ in range(4)]
    threads = [threading.Thread(target=store.put, args=(data,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    artifact = artifact_of(data)
    assert [p.name for p in (tmp_path / "c").iterdir()] == [artifact.sha256]
    assert ArtifactStore(tmp_path / "c").get(artifact) == data
