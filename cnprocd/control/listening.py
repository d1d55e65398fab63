"""The socket behind cnprocctl: its file, its permissions, and the file of a daemon that has ended."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from cnprocd.errors import StateError


def listening_socket(path: Path, group: int | None) -> socket.socket:
    """Return the socket at `path`, open to its owner and `group`. Raises OSError or StateError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _clear_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    umask = os.umask(0o177)
    try:
        listening.bind(str(path))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(umask)
    if group is not None:
        open_to_group(path, group)
    return listening


def open_to_group(path: Path, group: int) -> None:
    """Let the group connect. If chown(2) is not permitted, the owner alone can connect, which is safe.

    In the systemd service the file has this group already, and chown(2) is not among the permitted system calls.
    """
    if os.stat(path).st_gid != group:
        try:
            os.chown(path, -1, group)
        except PermissionError:
            return
    os.chmod(path, 0o660)


def _clear_stale(path: Path) -> None:
    """Remove the socket of a daemon that died. Raises StateError if a daemon uses it or another file is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:  # EAGAIN: its backlog is full, so it lives
                raise StateError(f"cannot listen on {path}: {error.strerror}", "see what uses it") from error
            if not stat.S_ISSOCK(os.lstat(path).st_mode):  # a plain file refuses connections as well
                raise StateError(f"cannot listen on {path}: it is not a socket", "remove the file") from error
            os.unlink(path)
            return
    raise StateError(
        f"cannot listen on {path}: another cnprocd does", "stop it, or use another --runtime-dir for this one"
    )
