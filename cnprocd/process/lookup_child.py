"""The worker process that reads /proc. Run as a script of its own, it imports nothing of cnprocd.

A read of these files can wait for as long as the process that is read wishes (see lookups.py). This process waits, not
the daemon, which kills it after the deadline: every one of these waits in the kernel is killable.

A request is a byte of FILES bits and native 32-bit PIDs. The answer has for each PID and each file of FILES, asked for
or not: a native 16-bit length and the bytes, ABSENT if it was not asked for or cannot be read.

A request that begins with PATHS has paths of the host, each ended by NUL. The answer has the device and inode number of
each, native 64-bit, 0 and 0 if there is no such file, it may not be seen, or the path goes over a symbolic link:
the kernel shows the path of a program without them.
"""

import functools
import os
import re
import select
import struct

FILES = ("stat", "status", "program", "cmdline", "cgroup", "loginuid")
PATHS = 0
MOST_PIDS = 6  # of one request: the answer must be shorter than worker.MOST_MESSAGE_BYTES
LONGEST = 4096
LONGEST_CGROUP = 8192  # a path of 4096 bytes, and the lines of the v1 hierarchies before it
ABSENT = 0xFFFF
DELETED = b" (deleted)"  # fs/d_path.c
AT_TEXT, AT_PATH, HOST_MOUNT = 1, 2, 4
_LENGTH = struct.Struct("=H")
_FILE = struct.Struct("=QQ")
_OCTAL = re.compile(rb"\\([0-7]{3})")


def file_at(path: bytes) -> tuple[int, int]:
    """Return device and inode number of the file whose path this is, or zeros."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError):
        return 0, 0
    try:
        if path_of(fd) != path:
            return 0, 0
        found = os.fstat(fd)
    except OSError:
        return 0, 0
    finally:
        os.close(fd)
    return found.st_dev, found.st_ino


def path_of(fd: int) -> bytes:
    """Return the path that the kernel shows of an open file."""
    return os.readlink(b"/proc/self/fd/%d" % fd)


class MountPoints:
    """The mount points of one process's mount namespace, by mount id (proc_pid_mountinfo(5))."""

    def __init__(self, pid: str) -> None:
        self._path = f"/proc/{pid}/mountinfo"
        self._poll = select.poll()
        self._poll.register(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), select.POLLPRI)  # open for ever
        self._points = self._read()

    def holds(self, mount: int, path: bytes) -> bool:
        """Return whether a file that keeps this mount busy is in this namespace, and the path below its mount point.

        A mount id is given away again after the mount is gone, so the mounts are read again if they have changed. A
        file that was moved out of its mount has a path that does not begin with the mount point (fs/d_path.c).
        """
        if self._poll.poll(0):
            self._points = self._read()
        point = self._points.get(mount)
        return point is not None and (path + b"/").startswith(point.rstrip(b"/") + b"/")

    def _read(self) -> dict[int, bytes]:
        with open(self._path, "rb") as file:
            lines = [line.split(b" ", 5) for line in file]
        return {int(line[0]): _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), line[4]) for line in lines}


@functools.cache
def mount_points(pid: str) -> MountPoints | None:
    """Return the mount points of a process; None if they cannot be read."""
    try:
        return MountPoints(pid)
    except OSError:
        return None


def is_on_host(fd: int, path: bytes) -> bool:
    """Return whether an open file is on a mount of the host, so that the kernel's path of it is a path of the host.

    Root alone arranges the mounts of PID 1 and of this process. The mount namespace of the process that executes a file
    proves nothing: /proc/PID/root and descriptors lead to the files of other namespaces.
    """
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        found = re.search(rb"^mnt_id:\t([0-9]+)$", file.read(), re.MULTILINE)
    if found is None:
        return False
    tables = (mount_points("1"), mount_points("self"))
    return any(table is not None and table.holds(int(found[1]), path) for table in tables)


def program(pid: int) -> bytes:
    """Return device and inode number of the file that a process executes, what vouches for its path, and that path.

    AT_TEXT: the host has this file at the text that /proc/PID/exe shows; AT_PATH: at that text or at the text without
    the kernel's mark of a deleted file. HOST_MOUNT: it has it at neither, and the file is on a mount of the host. All
    is asked of one open file: the process may execute another one meanwhile.
    """
    fd = os.open(b"/proc/%d/exe" % pid, os.O_PATH | os.O_CLOEXEC)
    try:
        shown, found = path_of(fd), os.fstat(fd)
        file, path = (found.st_dev, found.st_ino), shown.removesuffix(DELETED)
        evidence = 0
        if file_at(shown) == file:
            evidence = AT_TEXT | AT_PATH
        elif path != shown and file_at(path) == file:
            evidence = AT_PATH
        elif is_on_host(fd, path):
            evidence = HOST_MOUNT
    finally:
        os.close(fd)
    return _FILE.pack(*file) + bytes([evidence]) + shown


def read(pid: int, name: str) -> bytes | None:
    """Return the content of a file of a process, or None."""
    path = f"/proc/{pid}/{name}"
    try:
        if name == "program":
            return program(pid)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, LONGEST_CGROUP if name == "cgroup" else LONGEST)
        finally:
            os.close(fd)
    except OSError:  # gone, or not permitted
        return None


def answer(request: bytes) -> bytes:
    if request[0] == PATHS:
        return b"".join(_FILE.pack(*file_at(path)) for path in request[1:].split(b"\0")[:-1])
    parts = []
    wanted = request[0]
    for (pid,) in struct.iter_unpack("=I", request[1:]):
        gone = False
        for bit, name in enumerate(FILES):
            content = read(pid, name) if wanted >> bit & 1 and not gone else None
            gone = gone or (content is None and bit == 0)  # without its stat file a process is gone
            parts += [_LENGTH.pack(ABSENT if content is None else len(content)), content or b""]
    return b"".join(parts)


def main() -> None:
    os.write(0, b"ready")
    while request := os.read(0, 1 << 17):
        os.write(0, answer(request))


if __name__ == "__main__":
    main()
