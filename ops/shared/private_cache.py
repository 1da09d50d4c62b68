"""Where compiled kernels are kept: folders and files that this user alone, or root, can have written.

A library is loaded into the process, so nobody else may put one there or take the place of the folder, wherever it
lies; and it may be cut short by a full disk or a lost machine, so its name carries its digest.
"""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from pathlib import Path

try:
    import grp
    import pwd
except ImportError:  # no Unix
    grp = pwd = None

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ForeignFolder(OSError):
    """A folder into which somebody else could put a library of theirs; `strerror` says where."""


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def cache_folders() -> list[Path]:
    """Where compiled kernels are looked for, and kept in the first that can be written."""
    chosen = os.environ.get("OCTAVO_CACHE")
    folders = [Path(chosen)] if chosen else []
    if not chosen:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folders.append(Path("~/.cache/octavo/kernels").expanduser())
    with contextlib.suppress(FileNotFoundError):  # no temporary folder can be written
        folders.append(Path(tempfile.gettempdir()) / f"octavo-kernels-{_user()}")
    return folders


def _is_own_group(group: int) -> bool:
    """Whether a group is root's or, as many systems give each user one, this user's alone."""
    if group == 0 or grp is None:
        return group == 0
    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(_user()).pw_name
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}


def _check_parents(folder: Path) -> None:
    """Raise ForeignFolder if somebody else could put another folder in the place of a resolved one.

    Each folder on the way belongs to this user or root, and either nobody else can write it or, as in the temporary
    folder, they cannot rename there what is not theirs.
    """
    root = Path(folder.anchor).stat().st_uid  # not 0 in a container whose users are not those of the machine
    for place in folder.parents:
        state = place.stat()
        shared = state.st_mode & (stat.S_IWOTH if _is_own_group(state.st_gid) else _OTHERS_WRITE)
        if state.st_uid not in (0, _user(), root) or (shared and not state.st_mode & stat.S_ISVTX):
            raise ForeignFolder(errno.EPERM, f"somebody else can write {place}", str(folder))


def _is_ours(state: os.stat_result) -> bool:
    """Whether a file or folder is this user's or root's, and nobody else can write it."""
    return state.st_uid in (0, _user()) and not state.st_mode & _OTHERS_WRITE


def _make_private(folder: Path) -> None:
    """Make a folder, and the parents that are missing, for this user alone, whatever the umask."""
    if not folder.exists():
        _make_private(folder.parent)
        with contextlib.suppress(FileExistsError):  # another process was first
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)


def private_folder(folder: Path) -> Path:
    """A cache folder by its true path, made if it is not there.

    Raises:
        ForeignFolder: somebody else could write there.
        OSError: it cannot be made.
    """
    try:
        folder = folder.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, str(error), str(folder)) from None
    has_users = hasattr(os, "geteuid")
    if has_users:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        _check_parents(folder if existing == folder else existing / "new")
    _make_private(folder)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder", str(folder))
    if has_users and not _is_ours(folder.stat()):
        raise ForeignFolder(errno.EPERM, "somebody else can write it", str(folder))
    return folder


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _is_intact(library: Path) -> bool:
    """Whether a library is a file of ours that holds what its name says."""
    state = library.lstat()
    if not stat.S_ISREG(state.st_mode) or (hasattr(os, "geteuid") and not _is_ours(state)):
        return False
    return library.stem.endswith(f"-{_digest(library.read_bytes())}")


def find_library(folder: Path, stem: str) -> Path | None:
    """The whole library `STEM-DIGEST.so` of a private folder, or None; what is not whole is removed where it can be."""
    for library in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            if _is_intact(library):
                return library
        discard_library(library)
    return None


def discard_library(library: Path) -> None:
    """Remove a library that is of no use, if that can be done."""
    with contextlib.suppress(OSError):
        library.unlink()


def new_scratch(folder: Path) -> tempfile.TemporaryDirectory:
    """A new directory in a private folder, whatever the umask.

    Raises:
        OSError: it cannot be written.
    """
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".", ignore_cleanup_errors=True)
    Path(scratch.name).chmod(0o700)
    return scratch


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def keep_library(built: Path, folder: Path, stem: str) -> Path:
    """Move a library into a private folder, whole or not at all; the path there.

    Raises:
        OSError: it cannot be written.
    """
    built.chmod(0o600)
    library = folder / f"{stem}-{_digest(built.read_bytes())}.so"
    _sync(built)
    built.replace(library)
    with contextlib.suppress(OSError):  # which not all file systems do for folders
        _sync(folder)
    return library
