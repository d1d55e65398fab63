"""What a process in a container sees of the host: cgroup paths that count from elsewhere, and files of the image."""

import os

import pytest

from cnprocd.process import host_view
from cnprocd.process.stat import HOST_CGROUPS, CgroupRoot, CgroupRoots, parse_cgroup

POD = "/kubepods.slice/kubepods-podX.slice/cri-containerd-Y.scope"


@pytest.mark.parametrize(
    ("seen", "absolute"),
    [
        ("/", POD),
        ("/sub", f"{POD}/sub"),
        ("/..", "/kubepods.slice/kubepods-podX.slice"),
        ("/../cri-containerd-Z.scope", "/kubepods.slice/kubepods-podX.slice/cri-containerd-Z.scope"),
        ("/../../kubepods-podA.slice/crio-B.scope", "/kubepods.slice/kubepods-podA.slice/crio-B.scope"),
        ("/../../../system.slice/ssh.service", "/system.slice/ssh.service"),
        ("/../../..", "/"),
        ("/../../../..", None),
    ],
)
def test_a_path_of_another_namespace_is_counted_from_the_root(seen, absolute):
    assert CgroupRoot(3, POD).absolute(seen) == absolute


@pytest.mark.parametrize(
    ("seen", "absolute"),
    [("/../../../system.slice/a.service", "/system.slice/a.service"), ("/", None), ("/../b", None)],
)
def test_without_its_own_path_only_paths_from_the_root_are_known(seen, absolute):
    assert CgroupRoot(3, None).absolute(seen) == absolute


def test_each_hierarchy_counts_from_its_own_root():
    """A hybrid system with a container in the unified hierarchy alone, and one in both."""
    roots = CgroupRoots(CgroupRoot(1, "/box"), CgroupRoot())
    assert parse_cgroup(b"1:name=systemd:/a.service\n0::/..\n", roots) == "/a.service"
    assert parse_cgroup(b"1:name=systemd:/\n0::/../other\n", roots) == "/other"
    both = CgroupRoots(CgroupRoot(1, "/box"), CgroupRoot(2, "/system.slice/box"))
    assert parse_cgroup(b"1:name=systemd:/../../system.slice/a.service\n0::/..\n", both) == "/system.slice/a.service"


def test_the_own_cgroup_is_found_by_its_pid_at_its_depth(tmp_path):
    for name in ("a/b", "a/c", "d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").write_text("1\n2\n")
    assert host_view._own_path(str(tmp_path), 2) is None
    (tmp_path / "a/c/cgroup.procs").write_text(f"1\n{os.getpid()}\n")
    assert host_view._own_path(str(tmp_path), 2) == "/a/c"
    assert host_view._own_path(str(tmp_path), 1) is None


def test_this_process_sees_the_host():
    assert host_view.cgroup_roots() == HOST_CGROUPS
    assert host_view.sees_host_files({})


def test_without_the_root_of_pid_1_the_manager_is_believed(monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda one, other: (_ for _ in ()).throw(PermissionError))
    assert host_view.sees_host_files({})
    assert not host_view.sees_host_files({"container": "oci"})
