"""Files that are there whole or not at all, that show any damage, and a folder that one run at a time works in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from singe_plugin.errors import ArtifactError, ConfigError

__all__ = [
    "DEEPEST", "LOCK", "REMEDY", "describe", "digest", "locked", "make_folder", "parse", "seal", "sweep", "unseal",
    "write_atomically", "write_text",
]  # fmt: skip

LOCK = "run.lock"
REMEDY = "take an undamaged copy, or run it again"
DEEPEST = 64
"""How deep lists and dictionaries of a record may be nested; what is written is some ten deep."""


# -- writing ------------------------------------------------------------------------------------------------------


def make_folder(path: str | Path) -> Path:
    """Make sure of a folder that can be written to.

    Raises:
        ConfigError: if it is no path.
        ArtifactError: if it is a file, cannot be made, or must not be written to.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{path!r} is not the path of a folder; give a string or a Path")
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be used as an output folder: {_reason(error)}; choose another folder"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ArtifactError(f"{path} cannot be used as an output folder: it is read-only; choose another folder")
    return path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that it is there whole or not at all, whenever the process is killed.

    Args:
        path: the file; its folder is made if need be, and its mode is what the umask says.
        write: writes to the path that it is given.

    Raises:
        ArtifactError: if it cannot be written (no space, a limit, no permission, a folder of that name). Nothing is
            left behind, and what was there before is still there.
    """
    workshop = (
        path.parent / f"{_WORKSHOP}{secrets.token_hex(6)}"
    )  # safetensors makes a file of its own beside its target
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{path} is a folder")
        workshop.mkdir()
        temporary = workshop / path.name
        mode = _create(temporary)
        write(temporary)
        os.chmod(temporary, mode)  # safetensors and tempfile make files 0600
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors writes by itself, and has an error of its own
        raise ArtifactError(
            f"{path} cannot be written: {_reason(error)}; make room or give the permission, or choose another folder"
        ) from error
    finally:
        _clear(workshop)


_WORKSHOP = ".singe-"


def sweep(folder: Path) -> None:
    """Take away what a kill left half-written in a folder that nobody else writes to."""
    for workshop in folder.glob(f"{_WORKSHOP}*"):
        _clear(workshop)


def _clear(workshop: Path) -> None:
    """Delete a folder of files; what the system does not let go of stays."""
    with contextlib.suppress(OSError):
        for file in workshop.iterdir():
            file.unlink()
        workshop.rmdir()


def _create(path: Path) -> int:
    """Make an empty file, and return the mode that the umask gives it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _reason(error: Exception) -> str:
    """Say an error of the system in its own words, without the path that the message names anyway."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


# -- checksums ----------------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """Compute a checksum of a tensor's dtype, shape and bytes, the same on every device and in every memory format.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
        (True, False)
    """
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Compute every tensor's checksum, for a record that belongs to them."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a record a checksum of everything in it.

    Example:
        >>> unseal(seal({"a": [1, None]}), "it")
        {'a': [1, None]}
    """
    return {**record, "checksum": _checksum(record)}


def unseal(record: Any, what: str | Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Check a record, and return it without its checksum.

    Raises:
        ArtifactError: if something in it has changed since it was sealed.
    """
    rest = {k: v for k, v in record.items() if k != "checksum"} if isinstance(record, dict) else {}
    if not isinstance(record, dict) or record.get("checksum") != _checksum(rest):
        raise ArtifactError(f"{what} is damaged: its checksum is not that of its content; {remedy}")
    return rest


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def parse(text: str | bytes, what: str | Path, remedy: str = REMEDY) -> Any:
    """Read JSON as plain values.

    Raises:
        ArtifactError: if it is none, or nested deeper than any record is.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is damaged: {type(error).__name__}: {error}; {remedy}") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return value
    raise ArtifactError(f"{what} is damaged: it is nested more than {DEEPEST} deep; {remedy}")


# -- one run in a folder ------------------------------------------------------------------------------------------

_HELD: dict[str, tuple[int, int, bool]] = {}  # folder -> process and thread that hold it, and whether a run is in it
_GUARD = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | Path, run: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, those of other processes too; the lock goes when its process does.

    The lock is a file with the number of the process. A lock of the system on it is what counts: after a kill the file
    may stay, and does not matter. Where the file system has no locks, nobody is kept out.

    Args:
        folder: is made if need be.
        run: false if more than one run is done in here, one after the other.

    Raises:
        ArtifactError: if another run is in the folder, with the number of its process.
    """
    path = make_folder(folder).resolve() / LOCK
    key, me = str(path), (os.getpid(), threading.get_ident())
    with _GUARD:
        pid, thread, busy = _HELD.get(key, (0, 0, False))
        mine = (pid, thread) == me
        if pid == me[0] and (not mine or busy):
            raise _taken(folder, pid)
        handle = None if mine else _acquire(path, folder)
        _HELD[key] = (*me, run)
    try:
        yield
    finally:
        with _GUARD:
            if mine:
                _HELD[key] = (*me, False)
            else:
                del _HELD[key]
                if handle is not None:
                    path.unlink(missing_ok=True)
                    os.close(handle)


def _acquire(path: Path, folder: str | Path) -> int | None:
    """Return the open lock file, or None where there are no locks."""
    fcntl = _fcntl()
    while fcntl is not None:
        handle = None
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            # a lock of the process, not of the open file: workers that outlive a kill for a moment do not keep it
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
            os.close(handle)  # the one who had it has taken the file away in between
        except OSError as error:
            text = "" if handle is None else os.read(handle, 32).decode(errors="replace").strip()
            if handle is not None:
                os.close(handle)
            if error.errno in _NO_LOCKS:
                return None
            if handle is not None and error.errno in _BUSY:
                raise _taken(folder, text or "unknown") from error
            raise ArtifactError(f"{path} cannot be written: {_reason(error)}; choose another folder") from error
    return None


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_BUSY = (errno.EACCES, errno.EAGAIN)


def _is_still(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _taken(folder: str | Path, pid: int | str) -> ArtifactError:
    return ArtifactError(
        f"process {pid} is running in {folder} already; wait for its end (or stop it), or choose another folder"
    )


def _fcntl() -> ModuleType | None:
    """Import the system's locks, which Windows does not have."""
    return importlib.import_module("fcntl") if os.name == "posix" else None
