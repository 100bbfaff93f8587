"""Reads files of a model directory, and finds the directory that a name means.

What is wrong with a download (a Git LFS pointer, a cut file, a link into nowhere) is told here, before an engine has
spent a minute on it. Must never fetch anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.base.errors import InvalidRequest

_LFS = b"version https://git-lfs"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILE_BYTES = 256 * 1024 * 1024
"""Bound on files that are read whole; the largest known ``tokenizer.json`` has 35 MB."""


def locate(name: str, environ: Mapping[str, str] | None = None, *, what: str = "model", revision: str = "main") -> Path:
    """Return the directory that ``name`` means: a path, or a name whose files are in the Hugging Face cache.

    Args:
        name: a directory, or ``organisation/model`` as on the hub.
        environ: where ``HF_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` are looked up; None: of this process.
        what: for errors: ``model`` or ``adapter``.
        revision: branch, tag or commit of a cached one.

    Raises:
        InvalidRequest: there is no such directory; says where it was looked for and how to get it.
    """
    if not name.strip():
        raise InvalidRequest(f"No {what} directory is named.", param=what)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise InvalidRequest(f"{name} is a file; a {what} is a directory with Hugging Face files.", param=what)
    hub = hub_cache(os.environ if environ is None else environ)
    if not _HUB_NAME.fullmatch(name) or path.is_absolute():
        raise InvalidRequest(f"The {what} directory {name!r} does not exist; correct the path.", param=what)
    cached = _snapshot(hub / f"models--{name.replace('/', '--')}", revision)
    if cached is None:
        raise InvalidRequest(
            f"{name!r} is neither a directory (relative to {Path.cwd()}) nor in the Hugging Face cache at {hub} "
            f"(revision {revision!r}); workers download nothing. Run 'hf download {name}' beforehand, set HF_HOME to "
            f"the cache that has it, or name a directory.",
            param=what,
        )
    return cached


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return where ``huggingface_hub`` keeps what it has downloaded."""
    if explicit := environ.get("HF_HUB_CACHE"):
        return Path(explicit).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    caches = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "huggingface" / "hub"


def _snapshot(repository: Path, revision: str) -> Path | None:
    """Return the directory of a revision, or of the only one there is."""
    snapshots = repository / "snapshots"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    found = [one for one in snapshots.iterdir() if one.is_dir()] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 and revision == "main" else None


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer in place of the content."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def check_present(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        InvalidRequest: it is missing, a link into nowhere, empty, unreadable or a Git LFS pointer.
    """
    try:
        size = path.stat().st_size
        pointer = is_pointer(path)
    except FileNotFoundError as error:
        if path.is_symlink():
            why = f"{path} is a link to {path.readlink()}, which does not exist; copy the whole cache, not only links."
            raise InvalidRequest(why) from error
        raise InvalidRequest(f"{path} is missing; download or copy it again.") from error
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error
    if pointer:
        raise InvalidRequest(
            f"{path} is a Git LFS pointer of {size} bytes, not the file itself; run 'git lfs pull' where it was "
            f"cloned, or 'hf download'."
        )
    if size == 0:
        raise InvalidRequest(f"{path} is empty; the download did not finish. Fetch it again.")
    return size


def read_whole(path: Path) -> bytes:
    """Return the content of a file. Raises InvalidRequest as `check_present`, and for files of absurd size."""
    size = check_present(path)
    if size > _SMALL_FILE_BYTES:
        raise InvalidRequest(f"{path} has {size} bytes; at most {_SMALL_FILE_BYTES} are read of such a file.")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InvalidRequest when it is missing, damaged or no object."""
    try:
        value = json.loads(read_whole(path))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} holds {type(value).__name__} where an object was expected; fetch it again.")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one when there is no file. Raises as `read_json` otherwise."""
    return read_json(path) if path.exists() or path.is_symlink() else {}
