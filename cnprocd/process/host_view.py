"""What a container hides from a process that shares the host's PID namespace: the host's files, and cgroup paths.

In a cgroup namespace of its own (Kubernetes and Podman on cgroup v2) /proc/PID/cgroup counts from the container's own
cgroup: "/../../system.slice/ssh.service" (cgroup_namespaces(7)). The number of ".." for PID 1 is the depth of that
cgroup. A path with as many leads from the root. One with fewer shares the first directories of the container's own
path, which only the host's cgroup hierarchy shows. It must be mounted, at HOST_CGROUP because container engines mount
that of the container at /sys/fs/cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cnprocd.process.stat import HOST_CGROUPS, CgroupRoot, CgroupRoots, cgroup_lines

_INIT_CGROUP_NAMESPACE = 0xEFFFFFFB  # include/linux/proc_ns.h
HOST_CGROUP = "/host/sys/fs/cgroup"
_UNIFIED = tuple(f"{top}{below}" for top in ("/sys/fs/cgroup", HOST_CGROUP) for below in ("", "/unified"))
_NAMED = ("/sys/fs/cgroup/systemd", f"{HOST_CGROUP}/systemd")


def sees_host_files(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a path of this process leads to the file that PID 1 has there. Not so in a container's image.

    Without CAP_SYS_PTRACE the root of PID 1 cannot be looked at. Then container managers are believed, which set the
    variable `container` (systemd's CONTAINER_INTERFACE) or make a cgroup namespace.
    """
    try:
        return os.path.samestat(os.stat("/proc/1/root/."), os.stat("/"))
    except OSError:
        return not environment.get("container") and not in_cgroup_namespace()


def in_cgroup_namespace() -> bool:
    """Return whether this process is in another cgroup namespace than the initial one."""
    try:
        return os.stat("/proc/self/ns/cgroup").st_ino != _INIT_CGROUP_NAMESPACE
    except OSError:
        return False


@cache
def cgroup_roots() -> CgroupRoots:
    """Return where the paths of /proc/PID/cgroup count from. Walks the mounted hierarchy if that is not the root."""
    if not in_cgroup_namespace():
        return HOST_CGROUPS
    try:
        unified, named = cgroup_lines(Path("/proc/1/cgroup").read_bytes())
    except OSError:
        return HOST_CGROUPS
    return CgroupRoots(_root(unified, _UNIFIED), _root(named, _NAMED))


def _root(path_of_init: str | None, mount_points: tuple[str, ...]) -> CgroupRoot:
    depth = (path_of_init or "").split("/").count("..")
    if depth == 0:
        return CgroupRoot()
    found = (own for point in mount_points if (own := _own_path(point, depth)) is not None)
    return CgroupRoot(depth, next(found, None))


def _own_path(mount_point: str, depth: int) -> str | None:
    """Return the path of this process's cgroup, which is `depth` below the mount point, or None."""
    own = str(os.getpid()).encode()
    level = [mount_point]
    for _ in range(depth):
        level = [directory for above in level for directory in _directories(above)]
    for directory in level:
        try:
            if own in Path(directory, "cgroup.procs").read_bytes().split():
                return directory.removeprefix(mount_point)
        except OSError:
            continue
    return None


def _directories(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
