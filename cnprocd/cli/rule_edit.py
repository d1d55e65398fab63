"""Read a rule file for an editor, and replace it: for programs such as the Cockpit page, which must lose nothing.

An editor of text changes bytes that it cannot show: bytes that are not UTF-8, and line endings if there are several
kinds. Such a file is returned with the reason why it must not be edited as text. Replacing keeps the owner, the mode,
the access list and the security label, and goes to the target of a symbolic link.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cnprocd.errors import EX_NO, EX_NOPERM, CnprocdError
from cnprocd.rules.rule_files import DROPIN_DIRS, LARGEST, MAIN_FILE
from cnprocd.safe_open import UnsafeFileError, safe_open

ABSENT = "none"  # the hash of a file that does not exist
_LABELS = ("system.posix_acl_access", "security.selinux")
_NEW_MODE = 0o644
_LINE_END = re.compile("\r\n|\r|\n")


class RuleFileError(CnprocdError):
    """The file is not a rule file, or it must not be replaced."""

    exit_status = 2  # wrong usage


class RuleFileChangedError(RuleFileError):
    """The content is not what its editor has read."""

    exit_status = EX_NO


@dataclass(frozen=True, slots=True)
class RuleText:
    """A rule file as text with "\\n" as line ending. `newline` is the one in the file.

    `read_only` is the reason why the text cannot be written back without changing more than was edited, or None.
    """

    text: str
    newline: str
    hash: str
    read_only: str | None = None


def require_rule_file(path: Path, main: Path | None) -> Path:
    """Return the absolute path of a file that the daemon would read. `main` is that of --rules, which has no drop-ins.

    Raises RuleFileError.
    """
    found = Path(os.path.normpath(path.absolute()))
    if found == (main or MAIN_FILE).absolute():
        return found
    if main is None and found.parent in DROPIN_DIRS and found.suffix == ".yaml":
        return found
    places = ", ".join([str(main or MAIN_FILE), *(f"{one}/*.yaml" for one in DROPIN_DIRS if main is None)])
    raise RuleFileError(f"the daemon does not read {path}", f"it reads {places}")


def read_text(path: Path) -> RuleText:
    """Return the text of a rule file; of a file that does not exist, the empty text. Raises CnprocdError."""
    try:
        data = _content(path)
    except FileNotFoundError:
        return RuleText("", "\n", ABSENT)
    except OSError as error:
        refused = CnprocdError(f"cannot read {path}: {error.strerror}")
        refused.exit_status = EX_NOPERM if isinstance(error, PermissionError) else refused.exit_status
        raise refused from error
    if len(data) > LARGEST:
        raise RuleFileError(f"cannot read {path}: it is larger than {LARGEST >> 20} MiB", "the daemon refuses it")
    return text_of(data)


def text_of(data: bytes) -> RuleText:
    """Return the text of these bytes. PURE."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        why = f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})"
        return RuleText(_LINE_END.sub("\n", data.decode("utf-8", "backslashreplace")), "\n", digest, why)
    found = set(_LINE_END.findall(text))
    mixed = None if found <= {"\n"} or found == {"\r\n"} else "its lines end in different ways (CR, LF)"
    return RuleText(_LINE_END.sub("\n", text), "\r\n" if found == {"\r\n"} else "\n", digest, mixed)


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RuleFileError(f"cannot read {path}: it is not a regular file")
        return file.read(LARGEST + 1)


def write_text(path: Path, data: bytes, expected: str | None) -> str:
    """Replace a rule file, or create it. Return the hash of the content.

    If `expected` is given, the content must have had this hash. Other calls of this function wait meanwhile. Raises
    RuleFileChangedError, RuleFileError, UnsafeFileError, or OSError.
    """
    if len(data) > LARGEST:
        raise RuleFileError(f"cannot write {path}: more than {LARGEST >> 20} MiB", "use several files in rules.d")
    target = Path(os.path.realpath(path))
    if path.parent in DROPIN_DIRS[1:] or target.parent in DROPIN_DIRS[1:]:
        what = f"cannot write {path}: its place belongs to packages or to the running system"
        raise RuleFileError(what, f"write {DROPIN_DIRS[0]}/{path.name}, which takes precedence")
    if path.parent == DROPIN_DIRS[0]:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _replace(path, target, data, expected)
        os.fsync(directory)
    finally:
        os.close(directory)
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, target: Path, data: bytes, expected: str | None) -> None:
    former = _former(path, target)
    try:
        now = ABSENT if former is None else hashlib.sha256(_content(target)).hexdigest()
        if expected is not None and now != expected:
            raise RuleFileChangedError(f"{path} was changed since it was read", "read it again")
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                _keep_attributes(fd, former)
                file.flush()
                os.fsync(fd)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    finally:
        if former is not None:
            os.close(former)


def _former(path: Path, target: Path) -> int | None:
    """Return a descriptor of the file as it is, or None if there is none. Raises UnsafeFileError.

    A file that others can write is not replaced: its content would come to a place where others can change it.
    """
    try:
        return safe_open(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise RuleFileError(f"{path} is a symbolic link to {target}, which does not exist", "remove it") from None
    _require_safe(target.parent)
    return None


def _require_safe(directory: Path) -> None:
    for one in (directory, *directory.parents):
        found = one.stat()
        writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or writable:
            raise UnsafeFileError(f"{one} can be written by others than root", "move the rules to /etc/cnprocd")


def _keep_attributes(fd: int, former: int | None) -> None:
    """Give a new file the owner, the mode, the access list and the label of the one that it replaces."""
    if former is None:
        os.fchmod(fd, _NEW_MODE)
        return
    found = os.fstat(former)
    os.fchown(fd, found.st_uid, found.st_gid)
    for name in set(_LABELS).intersection(_attributes(former)):
        os.setxattr(fd, name, os.getxattr(former, name))
    os.fchmod(fd, stat.S_IMODE(found.st_mode))


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise
