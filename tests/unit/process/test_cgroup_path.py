"""Cgroup paths as systemd and the container engines make them, each with the source that makes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.process.cgroup_path import Container, Placement, placement_of

ID = "0123456789abcdef" * 4
INNER = "fedcba9876543210" * 4
TASK = "c23e5f76c09d438aa1824ca4058bdcab"
POD = "8dbc9c6c-2f1a-4f3e-9a76-0f3a1b2c3d4e"
POD_ = POD.replace("-", "_")
BURSTABLE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice"
KIND = f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{POD_}.slice"
ROOTLESS = "/user.slice/user-1000.slice/user@1000.service/user.slice"


def shape(name, path, *containers, pod=None, source):
    made = tuple(Container(id_, runtime) for id_, runtime in containers)
    return pytest.param(path, made, pod, id=name.replace(" ", "-"))


SHAPES = [
    shape("docker by systemd", f"/system.slice/docker-{ID}.scope", (ID, "docker"),
          source="moby daemon/oci_linux.go withCgroups: system.slice:docker:ID"),
    shape("docker by cgroupfs", f"/docker/{ID}", (ID, "docker"),
          source="moby daemon/oci_linux.go withCgroups: parent /docker"),
    shape("docker with an init system in it", f"/docker/{ID}/system.slice/nginx.service", (ID, "docker"),
          source="moby daemon/oci_linux.go; systemd in the container makes its tree below"),
    shape("docker rootless", f"{ROOTLESS}/docker-{ID}.scope", (ID, "docker"),
          source="moby daemon/oci_linux.go withCgroups: user.slice if Rootless"),
    shape("docker in docker", f"/docker/{ID}/docker/{INNER}", (ID, "docker"), (INNER, "docker"),
          source="moby daemon/oci_linux.go, below the cgroup of the outer daemon"),
    shape("podman by systemd", f"/machine.slice/libpod-{ID}.scope", (ID, "podman"),
          source="podman libpod/container_internal_linux.go getOCICgroupPath: slice:libpod:ID"),
    shape("podman with crun", f"/machine.slice/libpod-{ID}.scope/container", (ID, "podman"),
          source="podman libpod/container.go cGroupPath: PID 1 may have moved below the scope"),
    shape("podman rootless", f"{ROOTLESS}/libpod-{ID}.scope/container", (ID, "podman"),
          source="podman libpod/container.go SystemdDefaultRootlessCgroupParent"),
    shape("podman by cgroupfs", f"/libpod_parent/libpod-{ID}", (ID, "podman"),
          source="podman libpod/container.go CgroupfsDefaultCgroupParent"),
    shape("podman split", f"/system.slice/web.service/libpod-payload-{ID}", (ID, "podman"),
          source="podman libpod/container_internal_linux.go getOCICgroupPath: cgroupSplit (Quadlet)"),
    shape("podman pod", f"/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-{ID}.scope", (ID, "podman"),
          source="podman libpod/util_linux.go: SLICE-libpod_pod_ID.slice"),
    shape("podman pod by cgroupfs", f"/libpod_parent/{INNER}/libpod-{ID}", (ID, "podman"),
          source="podman libpod/pod_internal_linux.go platformRefresh: CgroupParent/ID of the pod"),
    shape("podman pod split", f"/system.slice/web-pod.service/libpod-payload-{ID}", (ID, "podman"),
          source="podman quadlet: a .pod file is a service"),
    shape("podman split rootless", f"/user.slice/user-7.slice/user@7.service/app.slice/web.service/libpod-payload-{ID}",
          (ID, "podman"), source="podman quadlet of a user"),
    shape("podman split conmon", "/system.slice/web.service/runtime",
          source="podman libpod/oci_conmon_linux.go: the runtime of --cgroups=split stands beside the payload"),
    shape("podman in docker", f"/docker/{INNER}/libpod_parent/libpod-{ID}", (INNER, "docker"), (ID, "podman"),
          source="podman by cgroupfs below the cgroup of the outer container"),
    shape("docker with a parent", f"/batch.slice/docker-{ID}.scope", (ID, "docker"),
          source="docker run --cgroup-parent=batch.slice"),
    shape("docker with a parent by cgroupfs", f"/batch/{ID}", (ID, None),
          source="docker run --cgroup-parent=/batch: the path does not show the engine"),
    shape("docker in incus", f"/lxc.payload.web/docker/{ID}", ("web", "lxc"), (ID, "docker"),
          source="security.nesting: the engine counts from its own cgroup"),
    shape("docker by systemd in incus", f"/lxc.payload.web/system.slice/docker-{ID}.scope", ("web", "lxc"),
          (ID, "docker"), source="security.nesting"),
    shape("kubernetes in lxc", f"/lxc/101/ns{BURSTABLE}/cri-containerd-{ID}.scope", ("101", "lxc"), (ID, "containerd"),
          pod=POD, source="k3s in a container of Proxmox"),
    shape("three deep", f"/docker/{INNER}{KIND}/cri-containerd-{ID}.scope/docker/{ID}", (INNER, "docker"),
          (ID, "containerd"), (ID, "docker"), pod=POD, source="docker in a pod of kind"),
    shape("podman conmon", f"/machine.slice/libpod-conmon-{ID}.scope",
          source="podman libpod/oci_conmon_linux.go moveConmonToCgroupAndSignal"),
    shape("podman conmon by cgroupfs", "/libpod_parent/conmon",
          source="podman libpod/oci_conmon_linux.go moveConmonToCgroupAndSignal: CgroupParent/conmon"),
    shape("containerd in a pod by systemd", f"{BURSTABLE}/cri-containerd-{ID}.scope", (ID, "containerd"), pod=POD,
          source="containerd internal/cri/server/helpers.go getCgroupsPath; kubelet cm ToSystemd"),
    shape("containerd by cgroupfs, kubelet by systemd",
          f"/system.slice/containerd.service/kubepods-burstable-pod{POD_}.slice:cri-containerd:{ID}",
          (ID, "containerd"), pod=POD,
          source="kubernetes issue 106514; containerd internal/cri/server/helpers.go getCgroupsPath"),
    shape("the same below the root", f"/kubepods-pod{POD_}.slice:cri-containerd:{ID}", (ID, "containerd"), pod=POD,
          source="kubernetes issue 106514, where containerd is not in a service"),
    shape("kata", f"/kubepods/burstable/pod{POD}/kata_{ID}", pod=POD,
          source="kata-containers: CGROUP_KATA_PREFIX before the id; it holds the virtual machine, no container"),
    shape("containerd in a guaranteed pod", f"/kubepods.slice/kubepods-pod{POD_}.slice/cri-containerd-{ID}.scope",
          (ID, "containerd"), pod=POD, source="kubelet pkg/kubelet/cm/qos_container_manager_linux.go: no class"),
    shape("kubernetes by cgroupfs", f"/kubepods/besteffort/pod{POD}/{ID}", (ID, None), pod=POD,
          source="kubelet pkg/kubelet/cm GetPodCgroupNameSuffix; containerd getCgroupsPath: parent/ID"),
    shape("static pod", f"/kubepods/burstable/pod{TASK}/{ID}", (ID, None), pod=TASK,
          source="kubelet pkg/kubelet/config/common.go: the UID of a static pod is an MD5 sum"),
    shape("docker in a pod", f"{BURSTABLE}/docker-{ID}.scope", (ID, "docker"), pod=POD,
          source="cri-dockerd: the pod's slice as CgroupParent"),
    shape("kind", f"/docker/{INNER}{KIND}/cri-containerd-{ID}.scope", (INNER, "docker"), (ID, "containerd"), pod=POD,
          source="kind: kubelet with --cgroup-root=/kubelet in a docker container"),
    shape("containerd alone", f"/default/{ID}", (ID, "containerd"),
          source="containerd pkg/oci/spec.go: CgroupsPath /NAMESPACE/ID"),
    shape("nerdctl", f"/system.slice/nerdctl-{ID}.scope", (ID, "containerd"),
          source="nerdctl pkg/cmd/container/run_cgroup_linux.go generateCgroupPath"),
    shape("cri-o by systemd", f"{BURSTABLE}/crio-{ID}.scope", (ID, "cri-o"), pod=POD,
          source="cri-o internal/config/cgmgr/systemd_linux.go ContainerCgroupPath"),
    shape("cri-o with crun", f"{BURSTABLE}/crio-{ID}.scope/container", (ID, "cri-o"), pod=POD,
          source="crun makes /container below the scope, as under podman"),
    shape("cri-o by cgroupfs", f"/kubepods/pod{POD}/crio-{ID}", (ID, "cri-o"), pod=POD,
          source="cri-o internal/config/cgmgr/cgroupfs_linux.go ContainerCgroupPath"),
    shape("cri-o conmon", f"/system.slice/crio-conmon-{ID}.scope",
          source="cri-o internal/config/cgmgr/systemd_linux.go MoveConmonToCgroup"),
    shape("cri-o conmon in the pod", f"/kubepods/burstable/pod{POD}/crio-conmon-{ID}", pod=POD,
          source="cri-o internal/config/cgmgr/cgroupfs_linux.go MoveConmonToCgroup"),
    shape("lxc", "/lxc.payload.web", ("web", "lxc"),
          source="lxc src/lxc/cgroups/cgroup.h DEFAULT_PAYLOAD_CGROUP_PREFIX"),
    shape("incus with an init system in it", "/lxc.payload.blue_web/system.slice/nginx.service", ("blue_web", "lxc"),
          source="incus uses liblxc; PROJECT_NAME outside of the default project"),
    shape("lxc 3", "/lxc.payload/web/init.scope", ("web", "lxc"), source="lxc 3.1 and 3.2: lxc.payload/NAME"),
    shape("lxc on proxmox", "/lxc/101/ns/init.scope", ("101", "lxc"), source="pve-container: lxc/VMID/ns"),
    shape("lxc in lxc", "/lxc.payload.outer/lxc.payload.inner", ("outer", "lxc"), ("inner", "lxc"),
          source="lxc src/lxc/cgroups/cgfsng.c, below the cgroup of the outer container"),
    shape("lxc monitor", "/lxc.monitor.web", source="lxc src/lxc/cgroups/cgroup.h DEFAULT_MONITOR_CGROUP_PREFIX"),
    shape("lxc 3 monitor", "/lxc.monitor/101", source="lxc 3.1 and 3.2: lxc.monitor/NAME"),
    shape("nspawn", r"/machine.slice/machine-web\x2d1.scope/payload/init.scope", ("web-1", "systemd-nspawn"),
          source="systemd src/nspawn/nspawn-cgroup.c create_subcgroup; machined names the scope"),
    shape("nspawn as a service", r"/machine.slice/systemd-nspawn@web.service/payload", ("web", "systemd-nspawn"),
          source="systemd units/systemd-nspawn@.service.in: --keep-unit, DelegateSubgroup=supervisor"),
    shape("nspawn supervisor", "/machine.slice/systemd-nspawn@web.service/supervisor",
          source="systemd src/nspawn/nspawn-cgroup.c create_subcgroup: supervisor"),
    shape("nspawn with docker in it", f"/machine.slice/machine-web.scope/payload/docker/{ID}",
          ("web", "systemd-nspawn"), (ID, "docker"),
          source="systemd src/nspawn/nspawn-cgroup.c create_subcgroup: payload"),
    shape("nspawn as a service with an escape", r"/machine.slice/systemd-nspawn@my\x2dbox.service/payload/init.scope",
          ("my-box", "systemd-nspawn"), source="systemd-nspawn@.service: %i of a name with a dash"),
    shape("virtual machine of vmspawn", "/user.slice/user-7.slice/user@7.service/app.slice/sd-vmspawn-17-vm.scope",
          source="systemd src/vmspawn/vmspawn-scope.c start_transient_scope"),
    shape("libvirt lxc", r"/machine.slice/machine-lxc\x2d12345\x2ddemo.scope/libvirt", ("demo", "libvirt-lxc"),
          source="libvirt docs/cgroups.rst, Systemd scope naming"),
    shape("virtual machine", r"/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt/emulator",
          source="libvirt docs/cgroups.rst: qemu is no container"),
    shape("ecs on ec2", f"/ecs/{TASK}/{ID}", (ID, None),
          source="amazon-ecs-agent agent/api/task/task_linux.go buildCgroupV1Root; the engine is docker's /parent/ID"),
    shape("ecs with cgroup v2", f"/ecstasks.slice/ecstasks-{TASK}.slice/docker-{ID}.scope", (ID, "docker"),
          source="amazon-ecs-agent agent/api/task/task_linux.go buildCgroupV2Root"),
    shape("fargate", f"/ecs/{TASK}/{TASK}-1234567890", (f"{TASK}-1234567890", "containerd"),
          source="google/cadvisor pull request 3923: /ecs/TASK/TASK-DIGITS in the namespace fargate.task"),
    shape("a service", "/system.slice/nginx.service", source="no engine"),
    shape("an id too short", "/docker/" + ID[:63], source="no engine"),
    shape("an id with more before it", "/x" + ID, source="no engine"),
    shape("the root", "/", source="no engine"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "containers", "pod"), SHAPES)
def test_containers_and_pod_of_a_path(path, containers, pod):
    placement = placement_of(path)
    assert (placement.containers, placement.pod_uid) == (containers, pod)
    assert placement.container == (containers[-1] if containers else None)


def test_at_least_22_shapes_have_a_container():
    with_container = [one for one in SHAPES if one.values[1]]
    assert len(with_container) >= 22
    assert len({one.values[0] for one in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize(
    ("container", "short"),
    [(Container(ID, "docker"), ID[:12]), (Container("web", "lxc"), "web"), (Container(f"{TASK}-1", None), f"{TASK}-1")],
)
def test_the_short_id_is_what_the_engine_lists(container, short):
    assert container.short_id == short


@pytest.mark.parametrize(
    ("path", "unit", "user_unit"),
    [
        ("/system.slice/nginx.service", "nginx.service", None),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", None),
        (r"/system.slice/system-systemd\x2dfsck.slice/systemd-fsck@dev-sda.service", "systemd-fsck@dev-sda.service",
         None),
        (r"/system.slice/mnt-my\x2ddata.mount", r"mnt-my\x2ddata.mount", None),
        ("/-.mount", "-.mount", None),
        ("/system.slice/_cpu.service", "cpu.service", None),
        ("/system.slice/__x.service", "_x.service", None),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/foo.service", "user@1000.service", "foo.service"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-x.scope", "user@1000.service",
         "app-gnome-x.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", "user@1000.service", "init.scope"),
        ("/user.slice/user-1000.slice/user@1000.service", "user@1000.service", None),
        ("/user.slice/user-1000.slice/session-2.scope", "session-2.scope", None),
        ("/user.slice/user-1000.slice/session-2.scope/x.service", "session-2.scope", None),
        ("/init.scope", "init.scope", None),
        ("/cnptest.service", "cnptest.service", None),
        (f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", None),
        ("/system.slice/delegated.service/payload/x.service", "delegated.service", None),
        ("/system.slice", None, None),
        ("/", None, None),
        ("", None, None),
        ("/lxc/web", None, None),
        (f"/docker/{ID}/system.slice/nginx.service", None, None),  # a unit of the container's systemd, not the host's
        ("/fake.service.d/x", None, None),
        ("/system.slice/.service", None, None),
        ("/system.slice/@x.service", None, None),
        ("/system.slice/my unit.service", None, None),
        ("/system.slice/bad\udcff.service", None, None),
        ("/system.slice/new\nline.service", None, None),
        ("/system.slice/" + "x" * 250 + ".service", None, None),
    ],
)  # fmt: skip
def test_the_unit_is_what_systemd_calls_it(path, unit, user_unit):
    placement = placement_of(path)
    assert (placement.unit, placement.user_unit) == (unit, user_unit)


PIECES = [*"/-_.@\\aAé\n\udcff", "\\x2d", ".service", ".slice", ".scope", "lxc", "pod", "machine-", "/docker-", ID, POD]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_path_gives_valid_units_and_names_from_it(path):
    placement = placement_of(path)
    for unit in (placement.unit, placement.user_unit):
        assert unit is None or (unit in path and unit.isascii() and unit.isprintable() and not set(unit) & set(" /"))
    for container in placement.containers:
        assert container.id
        assert container.runtime == "systemd-nspawn" or container.id in path


def test_a_path_without_anything_is_an_empty_placement():
    assert placement_of("/") == Placement()
