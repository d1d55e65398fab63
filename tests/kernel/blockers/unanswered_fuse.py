"""A user's process that hangs on a FUSE file whose server does not answer: `python unanswered_fuse.py KIND DEVICE DIR`.

The program becomes the user `nobody` in its own user and mount namespace, mounts a FUSE file system on DIR, starts one
victim, and prints the victim's PID when it is about to hang. It ends when its standard input is closed; the kernel
then aborts the connection and the victim goes on.

KIND `execve`: the victim holds the file open with O_CLOEXEC and calls execve(2). The kernel closes the file while it
holds the process's exec_update_lock, and waits for the answer to FLUSH (fs/exec.c begin_new_exec, fs/fuse/file.c).
KIND `mmap`: one thread of the victim waits for the answer to READ with a page locked; another maps the file, waits for
that page, and holds mmap_lock for writing meanwhile (fs/fuse/file.c fuse_file_mmap, invalidate_inode_pages2).

While it hangs, something makes the daemon look it up every 200 ms. In `execve` its children exit with 1, so that their
parent is read. In `mmap` another thread of it takes a name, so that the command line is read.

DEVICE is a character device 10:229 that the user may open; the kernel requires that it is opened in the user namespace
that mounts (fs/fuse/inode.c fuse_fill_super). Layouts: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct
import sys
import threading
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
LOOKUP, FORGET, GETATTR, OPEN, READ, FLUSH, INIT, INTERRUPT = 1, 2, 3, 14, 15, 25, 26, 36
HEADER_IN = struct.Struct("=IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, padding
HEADER_OUT = struct.Struct("=IiQ")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY = struct.Struct("=QQQQII")
ROOT_NODE, FILE_NODE = 1, 2
SIZE = 1 << 16
TURNS, TURN_EVERY_MS = 50, 200


def attributes(node: int) -> bytes:
    mode = 0o40755 if node == ROOT_NODE else 0o100644
    return ATTR.pack(node, SIZE, SIZE // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> bytes | None:
    """What the server answers; None: nothing, ever."""
    if opcode in (READ, FLUSH):
        return None
    if opcode == INIT:
        return struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 16, 12, 1 << 17, 1, 32, 0, 0)
    if opcode == LOOKUP:
        return ENTRY.pack(FILE_NODE, 0, 1000, 1000, 0, 0) + attributes(FILE_NODE)
    if opcode == GETATTR:
        return struct.pack("=QII", 1000, 0, 0) + attributes(node)
    if opcode == OPEN:  # O_DIRECT gets FOPEN_DIRECT_IO
        (flags,) = struct.unpack_from("=I", body)
        return struct.pack("=QIi", 1, int(flags & os.O_DIRECT != 0), 0)
    return b""


def serve(device: int, victim: int, next_turn: int) -> None:
    """Answer requests until standard input is closed. Print the PID of the victim when it hangs."""
    hangs, turns = False, TURNS
    poller = select.poll()
    poller.register(device, select.POLLIN)
    poller.register(0, select.POLLIN)
    while True:
        events = poller.poll(TURN_EVERY_MS)
        if hangs and turns and not events:
            os.write(next_turn, b"x")
            turns -= 1
        for fd, _ in events:
            if fd == 0:
                return
            if handle(device) in (READ, FLUSH) and not hangs:
                hangs = True
                print(victim, flush=True)


def handle(device: int) -> int:
    """Read one request, answer it if it is one that gets an answer, and return its opcode."""
    request = os.read(device, 1 << 18)
    _, opcode, unique, node, *_ = HEADER_IN.unpack_from(request)
    body = answer(opcode, node, request[HEADER_IN.size :])
    if body is not None and opcode not in (FORGET, INTERRUPT):  # these two never have one
        os.write(device, HEADER_OUT.pack(HEADER_OUT.size + len(body), 0, unique) + body)
    return int(opcode)


def own_namespaces() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    uid, gid = os.geteuid(), os.getegid()
    check(LIBC.prctl(4, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")  # else /proc/self/uid_map belongs to root
    check(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def hang_in_execve(path: str, turns: int) -> None:
    for _ in range(TURNS):
        if os.fork() == 0:
            os.read(turns, 1)
            os._exit(1)
    os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.execv("/bin/sleep", ["cnptest-fuse", "1000"])


def hang_in_mmap(path: str, turns: int) -> None:
    cached = os.open(path, os.O_RDONLY)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)  # before the read: open(2) waits for the page as well
    reader = threading.Thread(target=lambda: LIBC.read(cached, ctypes.create_string_buffer(1), 1), daemon=True)
    reader.start()
    while "request_wait" not in Path(f"/proc/self/task/{reader.native_id}/wchan").read_text():
        os.sched_yield()

    def take_names() -> None:
        while os.read(turns, 1):
            set_name()

    threading.Thread(target=take_names, daemon=True).start()
    LIBC.mmap(None, ctypes.c_size_t(SIZE), mmap.PROT_READ, mmap.MAP_PRIVATE, direct, ctypes.c_long(0))


def set_name() -> None:
    LIBC.prctl(15, b"cnptest-fuse", 0, 0, 0)


def main(kind: str, device_path: str, directory: str) -> None:
    own_namespaces()
    device = os.open(device_path, os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    check(LIBC.mount(b"fuse", directory.encode(), b"fuse", 0, options), "mount")
    turns, next_turn = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(device)
        os.close(next_turn)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        set_name()
        try:
            {"execve": hang_in_execve, "mmap": hang_in_mmap}[kind](f"{directory}/file", turns)
        finally:
            os._exit(77)
    serve(device, victim, next_turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
