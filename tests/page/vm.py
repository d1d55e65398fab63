"""`make test-page-vm`: the page in virtual machines with Debian 12's and 13's own Cockpit, under systemd.

Each guest installs the package of this source, starts cnprocd by systemctl, and starts its cockpit-ws. The browser of
this machine opens the page through a forwarded port of loopback, sees a process of the guest die, and takes a
screenshot. The guest has no other network. Needs what look.py and tests/vm need.

    python tests/page/vm.py [debian12] [debian13]
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from console import Browser, free_port
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / ".page"
PATIENCE_S = 120.0  # an emulated machine is some ten times slower
STEPS_S = {"boot": 60.0, "install": 420.0, "enable": 240.0, "console": 120.0, "death": 60.0}

sys.path.insert(0, str(ROOT / "tests/vm"))
import drive  # noqa: E402
import image  # noqa: E402
from qemu import Machine, pack_payload  # noqa: E402


class Guest(Machine):
    """A machine whose port 9090 is a port of this machine's loopback, and that reaches nothing."""

    port = 0

    def command(self) -> list[str]:
        forward = f"user,id=page,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:9090"
        return [*super().command(), "-netdev", forward, "-device", "virtio-net-pci,netdev=page"]

    def do(self, name: str) -> str:
        """Run a step of guest_steps.py. Return its detail."""
        answer = self.step(name, STEPS_S[name])
        assert answer["ok"], f"{name}: {answer['detail']}"
        return str(answer["detail"]).strip()


def payload(name: str, scratch: Path) -> Path:
    """Return the disk with the packages, the agent, and the steps of this directory."""
    files = drive.packages(name, scratch)
    files |= {path.name: path for path in (ROOT / "tests/vm/guest").glob("*.py")}
    files["steps.py"] = HERE / "guest_steps.py"
    return pack_payload(scratch / "payload.tar", files)


def look(guest: Guest, browser: Browser) -> None:
    """Open the page, see a death live, and the rules."""
    browser.open(f"http://127.0.0.1:{guest.port}")
    browser.see("watching", ".tiles", PATIENCE_S)
    pid = guest.do("death")
    browser.see(f"[{pid}]", "tbody", PATIENCE_S)
    browser.go("/rules")
    browser.see("of 4", "tbody", PATIENCE_S)
    browser.go("/edit")
    browser.see("No mistakes", ".alert", PATIENCE_S)
    browser.go("/")
    browser.see("watching", ".tiles", PATIENCE_S)
    browser.find("svg.chart")
    if errors := browser.errors():
        raise AssertionError(f"errors on the console of the browser: {errors}")


def take_through(name: str) -> None:
    base = image.RECIPES[name]
    recipe = replace(base, name=f"page-{name}", packages=(*base.packages, "cockpit-ws", "cockpit-bridge"))
    disk = image.obtain(recipe)
    with tempfile.TemporaryDirectory(prefix="cnprocd-page-vm-") as directory:
        scratch = Path(directory)
        guest = Guest(disk, payload(name, scratch), scratch)
        guest.port = free_port()
        began_s = time.monotonic()
        with guest:
            guest.wait_boot()
            print(f"{name}: booted in {time.monotonic() - began_s:.0f} s: {guest.do('boot')}", flush=True)
            print(f"    installed: {guest.do('install')}", flush=True)
            print(f"    running: {guest.do('enable')}", flush=True)
            version = guest.do("console")
            browser = Browser((1200, 800))
            try:
                look(guest, browser)
                picture = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
                picture.quantize(96, dither=Image.Dither.NONE).save(OUTPUT / f"vm-{name}.png", optimize=True)
            except BaseException:
                browser.driver.save_screenshot(str(OUTPUT / f"failed-vm-{name}.png"))
                raise
            finally:
                browser.close()
    print(f"    seen: the page in cockpit {version}, a death live, rules, editor; see .page/vm-{name}.png", flush=True)


def main() -> int:
    OUTPUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("debian12", "debian13"):
        take_through(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
