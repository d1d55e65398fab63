"""Make the guest images: a Debian suite as one ext4 file, its kernel, and an initrd of a few modules.

Strategy: an image contains the distribution and no file of this project. Packages, agent and steps are on a second
disk, so an image depends on its recipe only and is cached under the hash of the recipe. Three files result:

    root.ext4   mmdebstrap's tree, written by mke2fs -d (no loop device, no mount)
    vmlinuz     the cloud flavour of the suite's kernel: same version and proc connector, a third of the modules
    initrd      busybox, the modules for the root disk, and a nine-line init: Debian's own initrd starts udev and takes
                15 s longer under TCG

Facts relied on: Debian builds virtio_blk and ext4 as modules in every flavour, so a direct kernel boot needs an initrd.
linux-image-cloud-amd64 depends on exactly one linux-image-VERSION package. Modules are .ko (bookworm) or .ko.xz
(trixie). The Debian mirror is the one that apt of this machine uses.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE_SIZE = "1600M"  # sparse: only written blocks take space

# Packages of every guest. pytest and hypothesis are for tests/kernel on the guest's kernel. libpam-systemd: a service
# manager of a user needs the runtime directory that it makes.
COMMON_PACKAGES = (
    "systemd", "systemd-sysv", "udev", "dbus", "libpam-systemd", "kmod", "passwd", "procps", "python3",
    "python3-pytest", "python3-hypothesis",
)  # fmt: skip

# Modules for the root disk, in the order of modules.dep. Names that are built into a kernel are skipped.
ROOT_DISK_MODULES = ("virtio_pci", "virtio_blk", "ext4")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
while read module; do /bin/busybox insmod "$module" || echo "insmod $module failed"; done < /modules
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do n=$((n+1)); /bin/busybox usleep 50000; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox sh
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""

# The only unit added to the guest: unpack the payload disk (a plain tar on /dev/vdb) and run the agent in it.
AGENT_UNIT = """[Unit]
Description=cnprocd test agent
After=dev-vdb.device systemd-user-sessions.service
Wants=dev-vdb.device

[Service]
ExecStartPre=/bin/sh -c 'rm -rf /run/cnprocd-vm && mkdir -p /run/cnprocd-vm && tar -xf /dev/vdb -C /run/cnprocd-vm'
ExecStart=/usr/bin/python3 /run/cnprocd-vm/agent.py
WorkingDirectory=/root
Restart=on-failure
# A storm of ours must not make the guest's oom killer take the agent first.
OOMScoreAdjust=-900
KillMode=mixed

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the contents of an image."""

    name: str
    suite: str
    packages: tuple[str, ...]
    architecture: str = "amd64"

    @property
    def kernel(self) -> str:
        """Return the metapackage of the kernel: the cloud flavour."""
        return f"linux-image-cloud-{self.architecture}"


# python3-*: dependencies of the distribution-pure package; the guest has no network to fetch them.
TRIXIE_PACKAGES = (*COMMON_PACKAGES, "python3-pydantic", "python3-structlog", "python3-sdnotify", "python3-yaml")

RECIPES = {
    "debian12": Recipe("debian12", "bookworm", COMMON_PACKAGES),
    "debian13": Recipe("debian13", "trixie", TRIXIE_PACKAGES),
    "arm64": Recipe("arm64", "trixie", TRIXIE_PACKAGES, architecture="arm64"),
}


@dataclass(frozen=True)
class Image:
    """A built image: the files for qemu."""

    root: Path
    kernel: Path
    initrd: Path
    architecture: str


class ImageError(Exception):
    """An image cannot be made here; the text names what is missing."""


def cache_root() -> Path:
    """Return the directory of images: CNPROCD_VM_CACHE, or .vm/ in the checkout."""
    return Path(os.environ.get("CNPROCD_VM_CACHE") or REPOSITORY / ".vm")


def recipe_key(recipe: Recipe) -> str:
    """Return the hash of the recipe and of this file: any change of the contents changes the name."""
    parts = json.dumps(asdict(recipe)).encode() + Path(__file__).read_bytes()
    return hashlib.sha256(parts).hexdigest()[:16]


def obtain(recipe: Recipe) -> Image:
    """Return the image of `recipe` from the cache, or build it. Two runs at once are safe."""
    where = cache_root() / f"{recipe.name}-{recipe_key(recipe)}"
    with locked(cache_root() / f"{recipe.name}.lock"):
        if not where.is_dir():
            build(recipe, where)
            drop_stale(recipe, keep=where)
    return Image(where / "root.ext4", where / "vmlinuz", where / "initrd", recipe.architecture)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def drop_stale(recipe: Recipe, keep: Path) -> None:
    """Remove this guest's images of older recipes: each has several hundred megabytes."""
    for old in cache_root().glob(f"{recipe.name}-*"):
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)


def build(recipe: Recipe, where: Path) -> None:
    """Make the three files in a temporary directory beside `where`, then rename: no incomplete image is ever used."""
    tools = ["mmdebstrap", "mke2fs", "dpkg-deb"]
    packages = "mmdebstrap e2fsprogs"
    if recipe.architecture != run(["dpkg", "--print-architecture"]).strip():
        tools += ["arch-test", "qemu-aarch64-static"]  # the kernel starts its programs with the emulator (binfmt_misc)
        packages += " arch-test qemu-user-static binfmt-support"
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        raise ImageError(f"cannot build {recipe.name}: no {', '.join(missing)} (apt packages {packages})")
    if os.geteuid() != 0:
        raise ImageError(f"cannot build {recipe.name}: mmdebstrap and mke2fs -d must run as root to keep owners")
    with tempfile.TemporaryDirectory(prefix=f".{recipe.name}-", dir=where.parent) as scratch:
        tree, out = Path(scratch, "tree"), Path(scratch, "out")
        out.mkdir()
        bootstrap(recipe, tree)
        configure(tree)
        version = kernel_version(tree)
        shutil.copy(tree / "boot" / f"vmlinuz-{version}", out / "vmlinuz")
        (out / "initrd").write_bytes(initrd(tree, version))
        shutil.rmtree(tree / "boot")
        run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", str(tree), str(out / "root.ext4"),
             IMAGE_SIZE])  # fmt: skip
        out.rename(where)


def bootstrap(recipe: Recipe, tree: Path) -> None:
    """Install the packages of the suite and, in a hook that runs while apt still has its lists, the kernel."""
    slim = ["path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/doc/*"]
    run([
        "mmdebstrap", "--variant=apt", f"--include={','.join(recipe.packages)}",
        f"--architectures={recipe.architecture}",
        *(f"--aptopt={option}" for option in (*host_apt_options(), "Apt::Install-Recommends false")),
        *(f"--dpkgopt={option}" for option in slim),
        f'--customize-hook={sys.executable} {__file__} unpack-kernel {recipe.kernel} "$1"',
        recipe.suite, str(tree), f"deb {host_mirror()} {recipe.suite} main",
    ])  # fmt: skip


def unpack_kernel(flavour: str, tree: Path) -> None:
    """Unpack kernel and busybox. Installing a kernel package would pull in initramfs-tools and build an unused initrd.

    Runs in mmdebstrap's hook, whose apt sees the suite of the guest.
    """
    os.environ["APT_CONFIG"] = os.environ["MMDEBSTRAP_APT_CONFIG"]
    depends = run(["apt-cache", "depends", flavour])
    package = re.findall(r"Depends: (linux-image-\d\S*)", depends)[0]
    with tempfile.TemporaryDirectory() as scratch:
        run(["apt-get", "download", package, "busybox-static"], cwd=scratch)
        unpacked = Path(scratch, "unpacked")
        for deb in Path(scratch).glob("*.deb"):
            run(["dpkg-deb", "-x", str(deb), str(unpacked)])
        (tree / "boot").mkdir(exist_ok=True)
        shutil.move(next(unpacked.glob("boot/vmlinuz-*")), tree / "boot")
        shutil.move(next(path for path in unpacked.glob("**/bin/busybox") if path.is_file()), tree / "boot/busybox")
        # /lib/modules in bookworm's package, /usr/lib/modules in trixie's: the same directory in a merged /usr.
        modules = next(path for path in unpacked.glob("**/lib/modules/*") if path.is_dir())
        (tree / "usr/lib/modules").mkdir(parents=True, exist_ok=True)
        shutil.move(modules, tree / "usr/lib/modules")
        run(["chroot", str(tree), "depmod", modules.name])


def configure(tree: Path) -> None:
    """Set up root without a password on the console, the agent, and no timers that would wake a small guest."""
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 rw,noatime 0 0\n")
    unit = tree / "etc/systemd/system/cnprocd-vm-agent.service"
    unit.write_text(AGENT_UNIT)
    wants = tree / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / unit.name).symlink_to(f"../{unit.name}")
    for noise in ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
                  "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-timesyncd.service",
                  "systemd-networkd-wait-online.service", "e2scrub_reap.service"):  # fmt: skip
        (tree / "etc/systemd/system" / noise).symlink_to("/dev/null")
    journal = tree / "etc/systemd/journald.conf.d"
    journal.mkdir(parents=True)
    # Persistent: a step can read records from before a reboot. Unlimited: no record of a storm is dropped.
    (journal / "vm.conf").write_text("[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\nForwardToConsole=no\n")
    (tree / "etc/machine-id").write_text("")


def kernel_version(tree: Path) -> str:
    return next((tree / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")


def initrd(tree: Path, version: str) -> bytes:
    """Write a gzip-compressed newc archive: busybox, the modules for the root disk, /init."""
    base = tree / "usr/lib/modules" / version
    modules = list(closure(base / "modules.dep", ROOT_DISK_MODULES))
    archive = Cpio()
    for directory in ("dev", "proc", "root", "bin", "m"):
        archive.add(directory, b"", 0o040755)
    archive.add("dev/console", b"", 0o020600, device=(5, 1))
    archive.add("bin/busybox", (tree / "boot/busybox").read_bytes(), 0o100755)
    archive.add("init", INIT.encode(), 0o100755)
    names = []
    for path in modules:
        data = (base / path).read_bytes()
        names.append(f"m/{Path(path).name.removesuffix('.xz')}")
        archive.add(names[-1], lzma.decompress(data) if path.endswith(".xz") else data, 0o100644)
    archive.add("modules", "".join(f"/{name}\n" for name in names).encode(), 0o100644)
    return gzip.compress(archive.finish(), 1, mtime=0)


def closure(modules_dep: Path, wanted: Iterable[str]) -> Iterator[str]:
    """Return `wanted` and their dependencies first, from depmod's table. Built-in names are not in it."""
    table: dict[str, list[str]] = {}
    for line in modules_dep.read_text().splitlines():
        path, _, needs = line.partition(":")
        table[path] = needs.split()
    by_name = {re.sub(r"\.ko(\.xz)?$", "", Path(path).name).replace("-", "_"): path for path in table}
    seen: set[str] = set()

    def walk(path: str) -> Iterator[str]:
        if path not in seen:
            seen.add(path)
            for need in table[path]:
                yield from walk(need)
            yield path

    # ext4 requests crc32c from the crypto layer at run time; no table of symbols shows this.
    for name in (*(n for n in ("crc32c_generic", "crc32c_cryptoapi") if n in by_name), *wanted):
        if name in by_name:
            yield from walk(by_name[name])


class Cpio:
    """The newc format of Documentation/driver-api/early-userspace/buffer-format.rst."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.inode = 0

    def add(self, name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> None:
        self.inode += 1
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        self.out.write(b"070701" + "".join(f"{value:08x}" for value in fields).encode() + name.encode() + b"\0")
        self.pad()
        self.out.write(data)
        self.pad()

    def pad(self) -> None:
        self.out.write(b"\0" * (-self.out.tell() % 4))

    def finish(self) -> bytes:
        self.add("TRAILER!!!", b"", 0)
        return self.out.getvalue()


def host_mirror() -> str:
    """Return the Debian archive that apt of this machine uses."""
    fields = "$(REPO_URI)|$(ORIGIN)|$(LABEL)"
    text = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    for line in text.splitlines():
        uri, origin, label = line.split("|")
        if origin == label == "Debian":
            return uri
    raise ImageError("apt on this machine has no Debian archive configured (apt-get indextargets lists none)")


def host_apt_options() -> list[str]:
    """Return proxies and date checks of this machine's apt; the guest's packages come the same way."""
    keep = re.compile(r'Acquire::((https?|Retries|Check-[A-Za-z-]+)(::[^ ]*)?) "[^"]+";')
    return [line.rstrip(";") for line in run(["apt-config", "dump"]).splitlines() if keep.fullmatch(line)]


def run(command: list[str], cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise ImageError(f"{command[0]} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__" and sys.argv[1:2] == ["unpack-kernel"]:
    unpack_kernel(sys.argv[2], Path(sys.argv[3]))
elif __name__ == "__main__":
    for each in (RECIPES[name] for name in sys.argv[1:] or RECIPES):
        print(each.name, obtain(each).root)
