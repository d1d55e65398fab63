"""One guest: start qemu on an image, talk to the agent in it, end it.

Facts relied on: KVM does not start a guest here, so TCG is used (one host thread for each virtual CPU). A direct kernel
boot needs no boot loader. Writes go to a sparse copy of the image, which itself stays unchanged for the next run. A
reboot ends qemu (-no-reboot) and starts another on the same copy: a reset inside one qemu leaves a 6.1 kernel under TCG
in soft lockups. All waiting is on the agent's socket (select with a deadline), never a sleep.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from image import Image

ACCELERATOR = os.environ.get("CNPROCD_VM_ACCEL", "tcg,thread=multi")
# mitigations are expensive under TCG and not under test.
COMMAND_LINE = "root=/dev/vda rw quiet mitigations=off systemd.show_status=false panic=0"
BOOT_LIMIT_S = 240.0


@dataclass(frozen=True)
class Platform:
    """The emulator of one architecture, its machine, and what that adds to the kernel's command line."""

    emulator: str
    machine: tuple[str, ...]
    command_line: str
    slowness: float  # against amd64: factor of all time limits


PLATFORMS = {
    "amd64": Platform("qemu-system-x86_64", ("-machine", "q35", "-cpu", "max"), "console=ttyS0 tsc=reliable", 1.0),
    # Not -cpu max: pointer authentication is expensive under TCG.
    "arm64": Platform("qemu-system-aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "console=ttyAMA0", 3.0),
}


class MachineError(Exception):
    """The guest did not answer; the text has the end of its console."""


class Machine:
    """A running guest. `with Machine(...) as guest: guest.step("boot", 30)`."""

    def __init__(self, image: Image, payload: Path, scratch: Path) -> None:
        self.console = scratch / "console.log"
        self.channel_path = scratch / "agent.sock"
        self.image, self.payload = image, payload
        self.platform = PLATFORMS[image.architecture]
        self.buffer = b""
        self.counter = 0
        self.boot_id = ""

    def __enter__(self) -> Self:
        self.disk = self.console.with_name("root.ext4")
        subprocess.run(["cp", "--sparse=always", str(self.image.root), str(self.disk)], check=True)
        self.start()
        return self

    def start(self) -> None:
        """Start the guest."""
        errors = self.console.with_suffix(".qemu")
        self.channel_path.unlink(missing_ok=True)
        with errors.open("wb") as file:
            self.qemu = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file
            )
        self.buffer = b""
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + 20
        while self.channel.connect_ex(str(self.channel_path)):
            if self.qemu.poll() is not None or time.monotonic() > deadline:
                raise MachineError(f"qemu did not start: {errors.read_text()}")
            time.sleep(0.05)  # qemu sends no event when its socket exists; bounded by the deadline above

    def __exit__(self, *_: object) -> None:
        self.qemu.kill()
        self.qemu.wait()
        self.channel.close()

    def command(self) -> list[str]:
        platform = self.platform
        return [
            platform.emulator, "-accel", ACCELERATOR, *platform.machine, "-smp", "2", "-m", "1024",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd),
            "-append", f"{COMMAND_LINE} {platform.command_line}",
            "-drive", f"file={self.disk},if=virtio,format=raw,cache=unsafe",
            "-drive", f"file={self.payload},if=virtio,format=raw,readonly=on",
            "-device", "virtio-rng-pci",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self.channel_path},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=cnprocd.agent",
        ]  # fmt: skip

    def wait_boot(self) -> float:
        """Wait for the agent's hello of a new boot. Return the guest's uptime at that moment."""
        while True:
            message = self.receive(time.monotonic() + BOOT_LIMIT_S * self.platform.slowness)
            if message.get("hello") not in (None, self.boot_id):
                self.boot_id = message["hello"]
                return float(message["uptime"])

    def step(self, name: str, timeout: float) -> dict[str, Any]:
        """Let the agent run one step. The host waits a little longer than the agent."""
        self.counter += 1
        self.channel.sendall(json.dumps({"id": self.counter, "step": name, "timeout": timeout}).encode() + b"\n")
        while True:
            answer = self.receive(time.monotonic() + timeout + 60)
            if answer.get("id") == self.counter:
                return answer

    def reboot(self) -> float:
        """Request a reboot and wait for the next boot. The answer to the request may be lost."""
        self.counter += 1
        self.channel.sendall(json.dumps({"id": self.counter, "step": "reboot", "timeout": 60}).encode() + b"\n")
        try:
            self.qemu.wait(BOOT_LIMIT_S * self.platform.slowness)
        except subprocess.TimeoutExpired:
            raise MachineError(f"the guest did not shut down; end of its console:\n{self.console_tail()}") from None
        self.channel.close()
        self.start()
        return self.wait_boot()

    def receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.channel], [], [], max(0.0, deadline - time.monotonic()))
            data = self.channel.recv(65536) if ready else b""
            if not data:
                raise MachineError(f"the guest does not answer; end of its console:\n{self.console_tail()}")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def console_tail(self) -> str:
        return self.console.read_bytes()[-3000:].decode(errors="replace") if self.console.exists() else "(nothing)"


def qemu_missing(architecture: str) -> str:
    """Return why no guest can run here, or an empty string."""
    emulator, package = PLATFORMS[architecture].emulator, {"amd64": "x86", "arm64": "arm"}[architecture]
    return "" if shutil.which(emulator) else f"{emulator} is missing (apt package qemu-system-{package})"


def pack_payload(where: Path, files: dict[str, Path]) -> Path:
    """Write the second disk: a plain tar of `files` (name in the guest -> file here), padded to whole records."""
    with tarfile.open(where, "w") as tar:
        for name, path in sorted(files.items()):
            tar.add(path, name)
    return where
