"""From a cgroup path to the systemd unit, the container and the pod that it belongs to. PURE.

A path is text that PID 1, a container engine or the owner of a delegated subtree chose. Three rules:

- The unit is systemd's own reading of the path: skip the slices, and the next component is the unit's name. systemd
  puts one "_" before a name that a file of the kernel could have (`cpu.service`); it is taken away here. A component
  that is no valid unit name is no unit. So a unit's name holds only ASCII letters, digits and `:_.-@\\`, and needs no
  escaping: the name of `mnt-my\\x2ddata.mount` is exactly that text, and systemctl accepts it.
- A container is known by the directory that its engine makes. The processes that watch over a container (conmon,
  lxc.monitor, nspawn's supervisor) stand beside it and are not in it.
- Containers can be nested: the innermost is the container of the process, and the others are its chain.

Below a delegated cgroup (user@.service, a container with its own cgroup namespace) the delegate chooses the names: a
container there is a claim of the delegate.

Sources, by their names in the tables of the tests: systemd src/basic/cgroup-util.c and unit-name.c; moby
daemon/oci_linux.go; podman libpod/container_internal_linux.go and oci_conmon_linux.go; containerd
internal/cri/server/helpers.go; nerdctl pkg/cmd/container/run_cgroup_linux.go; cri-o internal/config/cgmgr; kubelet
pkg/kubelet/cm; LXC src/lxc/cgroups/cgroup.h; amazon-ecs-agent agent/api/task/task_linux.go; libvirt docs/cgroups.rst;
systemd src/nspawn/nspawn-cgroup.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

Runtime = Literal["docker", "podman", "containerd", "cri-o", "lxc", "libvirt-lxc", "systemd-nspawn"]
SHORT_ID_LENGTH = 12  # what `docker ps` and `podman ps` show of an id
_MAX_UNIT_BYTES = 255  # systemd: UNIT_NAME_MAX
_REMEMBERED_PATHS = 4096

_TYPES = "service|scope|socket|mount|swap|timer|path|device|automount|target"
_UNIT = re.compile(rf"[A-Za-z0-9:_.\\-][A-Za-z0-9:_.\\@-]*\.(?:{_TYPES})", re.ASCII)
_SLICE = re.compile(r"[A-Za-z0-9:_.\\-]+\.slice", re.ASCII)
_USER_MANAGER = re.compile(r"user@[0-9]+\.service", re.ASCII)

_HEX_ID = re.compile(r"[0-9a-f]{64}")
_FARGATE_ID = re.compile(r"[0-9a-f]{32}-[0-9]+")  # a task's id and a number
_SCOPE = re.compile(r"(docker|libpod|libpod-payload|cri-containerd|nerdctl|crio)-([0-9a-f]{64})(?:\.scope)?")
_UNSPLIT = re.compile(r"([^:]+\.slice):cri-containerd:([0-9a-f]{64})")
"""runc with the driver cgroupfs takes the path for one directory that a kubelet with the driver systemd gives."""
_SCOPE_RUNTIMES: dict[str, Runtime] = {
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",  # --cgroups=split
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
}
_PARENT_RUNTIMES: dict[str, Runtime] = {
    "docker": "docker",
    "default": "containerd",  # its default namespace: /NAMESPACE/ID
    "k8s.io": "containerd",  # the namespace of its CRI
}
_LXC_DIRECTORIES = frozenset({"lxc", "lxc.payload"})  # /lxc/NAME before LXC 3.1 and on Proxmox, /lxc.payload/NAME after
_LXC_PAYLOAD = "lxc.payload."
_MACHINE = re.compile(r"machine-(.+)\.scope")
_LIBVIRT_LXC = re.compile(r"lxc-[0-9]+-(.+)")
_NSPAWN = re.compile(r"systemd-nspawn@(.+)\.service")
_POD_CGROUPFS = re.compile(r"pod([0-9A-Za-z._-]+)")
_POD_SYSTEMD = re.compile(r"(?:.+-)?kubepods(?:-burstable|-besteffort)?-pod([0-9A-Za-z._]+)\.slice")
_QUALITY_CLASSES = frozenset({"kubepods", "burstable", "besteffort"})
_ESCAPED_BYTE = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Container:
    """A container by the name or id that its engine gave it. `runtime` is None where the path does not show it."""

    id: str
    runtime: Runtime | None

    @property
    def names(self) -> tuple[str, ...]:
        """The texts by which people name it: the id, and the short id if there is one."""
        return (self.id,) if self.short_id == self.id else (self.id, self.short_id)

    @property
    def short_id(self) -> str:
        """What the engine's own list shows: the first 12 digits of a 64-digit id, else the whole name."""
        return self.id[:SHORT_ID_LENGTH] if _HEX_ID.fullmatch(self.id) else self.id


@dataclass(frozen=True, slots=True)
class Placement:
    """What a cgroup path shows of its processes. None and () mean that it shows none."""

    unit: str | None = None
    user_unit: str | None = None
    containers: tuple[Container, ...] = ()  # outermost first
    pod_uid: str | None = None

    @property
    def container(self) -> Container | None:
        """The innermost container."""
        return self.containers[-1] if self.containers else None


@lru_cache(maxsize=_REMEMBERED_PATHS)
def placement_of(path: str) -> Placement:
    """What a cgroup path, counted from the root of the hierarchy, shows."""
    components = tuple(component for component in path.split("/") if component)
    unit, below = _unit(components)
    user_unit = _unit(below)[0] if unit is not None and _USER_MANAGER.fullmatch(unit) else None
    return Placement(unit, user_unit, _containers(components), _pod_uid(components))


def _unit(components: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The unit's name, and the components below it."""
    for depth, component in enumerate(components):
        name = component.removeprefix("_")
        if _SLICE.fullmatch(name):
            continue
        is_valid = len(name) <= _MAX_UNIT_BYTES and _UNIT.fullmatch(name)
        return (name, components[depth + 1 :]) if is_valid else (None, ())
    return None, ()


def _containers(components: tuple[str, ...]) -> tuple[Container, ...]:
    found = []
    for index, component in enumerate(components):
        above = components[index - 1] if index else ""
        below = components[index + 1] if index + 1 < len(components) else None
        one = _of_engine(component, above, below or "") or _of_lxc(component, above) or _of_machined(component, below)
        if one is not None:
            found.append(one)
    return tuple(found)


def _of_engine(component: str, above: str, below: str) -> Container | None:
    """Docker, Podman, containerd, CRI-O, ECS: a 64-digit id, alone or behind the name of its engine.

    Podman's directory of a pod is the pod's id alone, and the pod's containers are below it.
    """
    scope = _SCOPE.fullmatch(component)
    if scope is not None:
        return Container(scope[2], _SCOPE_RUNTIMES[scope[1]])
    unsplit = _UNSPLIT.fullmatch(component)
    if unsplit is not None:
        return Container(unsplit[2], "containerd")
    if _HEX_ID.fullmatch(component) and not below.startswith("libpod-"):
        return Container(component, _PARENT_RUNTIMES.get(above))
    if _FARGATE_ID.fullmatch(component) and component.startswith(above + "-"):
        return Container(component, "containerd")
    return None


def _of_lxc(component: str, above: str) -> Container | None:
    """LXC, Incus and LXD: by name. The monitor of a container has another directory."""
    name = component.removeprefix(_LXC_PAYLOAD)
    if name and name != component:
        return Container(name, "lxc")
    return Container(component, "lxc") if above in _LXC_DIRECTORIES else None


def _of_machined(component: str, below: str | None) -> Container | None:
    """systemd-nspawn and libvirt's LXC driver, as systemd-machined names them. A virtual machine is no container."""
    if below == "supervisor":
        return None
    service = _NSPAWN.fullmatch(component)
    if service is not None:
        return Container(_unescaped(service[1]), "systemd-nspawn") if below is not None else None
    machine = _MACHINE.fullmatch(component)
    if machine is None:
        return None
    name = _unescaped(machine[1])
    domain = _LIBVIRT_LXC.fullmatch(name)
    if domain is not None:
        return Container(domain[1], "libvirt-lxc")
    return None if name.startswith("qemu-") else Container(name, "systemd-nspawn")


def _pod_uid(components: tuple[str, ...]) -> str | None:
    """The innermost Kubernetes pod's UID."""
    found = None
    for above, component in pairwise(("", *components)):
        unsplit = _UNSPLIT.fullmatch(component)
        by_systemd = _POD_SYSTEMD.fullmatch(unsplit[1] if unsplit is not None else component)
        if by_systemd is not None:
            found = by_systemd[1].replace("_", "-")  # kubelet: "-" would be a step in the tree of slices
        elif above in _QUALITY_CLASSES:
            plain = _POD_CGROUPFS.fullmatch(component)
            found = plain[1] if plain is not None else found
    return found


def _unescaped(name: str) -> str:
    r"""A machine's name from a unit's: unit_name_escape() writes "-" as \x2d, as systemd-escape(1) does."""
    return _ESCAPED_BYTE.sub(lambda found: chr(int(found[1], 16)), name)
