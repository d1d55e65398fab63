"""The worker process that reads /proc. Run as a script of its own, it imports nothing of cnprocd.

A read of these files can wait for as long as the process that is read wishes (see lookups.py). This process waits, not
the daemon, which kills it after the deadline: every one of these waits in the kernel is killable.

A request is a byte of FILES bits and native 32-bit PIDs. The answer has for each PID and each file of FILES, asked for
or not: a native 16-bit length and the bytes, ABSENT if it was not asked for or cannot be read.

A request that begins with PATHS has paths of the host, each ended by NUL. The answer has the device and inode number of
each, native 64-bit, 0 and 0 if there is no such file, it may not be seen, or the path goes over a symbolic link:
the kernel shows the path of a program without them.
"""

import os
import struct

FILES = ("stat", "status", "exe", "exefile", "cmdline", "cgroup", "loginuid")
PATHS = 0
MOST_PIDS = 6  # of one request: the answer must be shorter than worker.MOST_MESSAGE_BYTES
LONGEST = 4096
LONGEST_CGROUP = 8192  # a path of 4096 bytes, and the lines of the v1 hierarchies before it
ABSENT = 0xFFFF
DELETED = b" (deleted)"  # fs/d_path.c
AT_TEXT, AT_PATH, HOST_MOUNTS = 1, 2, 4
_LENGTH = struct.Struct("=H")
_FILE = struct.Struct("=QQ")


def file_of(path: bytes) -> tuple[int, int]:
    """Return device and inode number of the file that a path leads to, or zeros."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def file_at(path: bytes) -> tuple[int, int]:
    """Return device and inode number of the file whose path this is, or zeros."""
    return file_of(path) if os.path.realpath(path) == path else (0, 0)


def executed_file(pid: int) -> bytes:
    """Return device and inode number of the file that a process executes, and what vouches for its path.

    AT_TEXT: the host has this file at the text that /proc/PID/exe shows; AT_PATH: at that text without the kernel's
    mark of a deleted file. HOST_MOUNTS: the process sees the mounts of PID 1 or those of the daemon, which root has
    arranged, so the text is a path of the host.
    """
    link = b"/proc/%d/exe" % pid
    text, file = os.readlink(link), file_of(link)
    mounts = file_of(b"/proc/%d/ns/mnt" % pid)
    at_text = file_of(text)
    at_path = file_of(text.removesuffix(DELETED)) if text.endswith(DELETED) else at_text
    is_known = file != (0, 0)
    evidence = AT_TEXT * (is_known and at_text == file) | AT_PATH * (is_known and at_path == file)
    hosts = (file_of(b"/proc/1/ns/mnt"), file_of(b"/proc/self/ns/mnt"))
    evidence |= HOST_MOUNTS * (mounts != (0, 0) and mounts in hosts)
    return _FILE.pack(*file) + bytes([evidence])


def read(pid: int, name: str) -> bytes | None:
    """Return the content of a file of a process, or None."""
    path = f"/proc/{pid}/{name}"
    try:
        if name == "exefile":
            return executed_file(pid)
        if name == "exe":
            return os.readlink(path.encode())
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
