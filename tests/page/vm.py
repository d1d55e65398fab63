"""`make test-page-vm`: the page in virtual machines with Debian 12's and 13's own Cockpit, under systemd.

Each guest listens with its cockpit.socket. The browser of this machine logs in through a forwarded port of loopback as
a user that may use sudo. The steps, in order: the service does not run; administrative access; the page starts it, with
invalid rules and then with valid ones; deaths live; a rule edited and loaded; the busiest programs; the links to
Cockpit's pages; the service stopped and started; the package removed and installed again while the page is open. The
guest has no other network. Needs what look.py and tests/vm need; ten minutes for each guest.

    python tests/page/vm.py [debian12] [debian13]
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from console import Browser, free_port, see

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / ".page"
PATIENCE_S = 180.0  # an emulated machine is some ten times slower
STEP_S = 420.0
MOST_LOGINS = 3
COCKPIT = ("cockpit", "sudo")

sys.path[:0] = [str(ROOT / "tests/vm"), str(ROOT / "tests/vm/guest")]
import drive  # noqa: E402
import image  # noqa: E402
from guest_steps import PASSWORD, USER  # noqa: E402
from qemu import Machine, pack_payload  # noqa: E402


class Guest(Machine):
    """A machine whose port 9090 is a port of this machine's loopback. It reaches nothing itself."""

    port = 0

    def command(self) -> list[str]:
        forward = f"user,id=page,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:9090"
        return [*super().command(), "-netdev", forward, "-device", "virtio-net-pci,netdev=page"]

    def do(self, name: str) -> str:
        """Run a step of guest_steps.py. Return its detail."""
        answer = self.step(name, STEP_S)
        assert answer["ok"], f"{name}: {answer['detail']}"
        return str(answer["detail"]).strip()


class Viewer:
    """The page in Cockpit's frame, as the user of the guest sees it."""

    def __init__(self, guest: Guest, name: str) -> None:
        self.guest = guest
        self.name = name
        self.browser = Browser((1280, 900), PATIENCE_S)

    def log_in(self) -> None:
        """Log in at Cockpit, which opens the page.

        On a busy machine the emulated one is too slow for Cockpit's time limit of a login: try again.
        """
        browser, refusal = self.browser, "Authentication failed"
        for _ in range(MOST_LOGINS):
            browser.driver.get(f"https://127.0.0.1:{self.guest.port}/cnprocd")
            browser.type("#login-user-input", USER)
            browser.type("#login-password-input", PASSWORD)
            browser.click("#login-button")
            with contextlib.suppress(AssertionError):
                browser.wait_for("an answer", lambda: "Process events" in browser.text() or refusal in browser.text())
            if "Process events" in browser.text("nav"):
                return self.enter()
        raise AssertionError(f"cannot log in: {MOST_LOGINS} attempts failed")

    def enter(self) -> None:
        """Look into the frame of the page."""
        self.browser.driver.switch_to.default_content()
        self.browser.driver.switch_to.frame(self.browser.find("iframe[name$='localhost/cnprocd']"))

    def become_administrator(self) -> None:
        """Turn on administrative access in Cockpit's dialog."""
        browser = self.browser
        browser.driver.switch_to.default_content()
        browser.click("button", "Limited access")
        browser.type("[role=dialog] input[type=password]", PASSWORD)
        browser.click("[role=dialog] button", "Authenticate")
        browser.find("button", "Administrative access")
        self.enter()

    def shot(self, state: str) -> None:
        """Keep a screenshot of Cockpit with the page in it."""
        self.browser.picture(OUTPUT / f"vm-{self.name}-{state}.png")

    def edit(self, text: str) -> None:
        """Replace what is in the editor."""
        self.browser.script(
            "const area = document.querySelector('textarea');"
            "area.setRangeText(arguments[0], 0, area.value.length, 'end'); area.dispatchEvent(new Event('input'))",
            text,
        )


# -- the steps, in order


def not_running(viewer: Viewer) -> None:
    """Look at the page while the service does not run, without and with administrative access."""
    browser, guest = viewer.browser, viewer.guest
    browser.see("cnprocd is not running")
    browser.see("To start it, turn on administrative access")
    assert "Start cnprocd" not in browser.text("button")
    assert "Errno" not in browser.text("main")
    viewer.become_administrator()
    browser.find("button", "Start cnprocd")
    viewer.shot("not-running")
    see("not running: without administrative access, advice; with it, the button that starts the service")
    guest.do("mistake")
    browser.click("button", "Start cnprocd")
    browser.find(".alert.bad")
    refused = browser.text(".alert.bad")
    browser.see("cnprocd is not running", "main")
    viewer.shot("start-failed")
    see(f"invalid rules: the start failed: {refused!r}")
    guest.do("rules")
    browser.click("button", "Start cnprocd")
    browser.see("watching", ".tiles")
    see(f"started by the page: {guest.do('active')}")


def live(viewer: Viewer) -> None:
    """See processes die."""
    browser, guest = viewer.browser, viewer.guest
    pid = guest.do("death")
    browser.see(f"vmpage[{pid}]", "tbody")
    browser.find("svg.chart")
    viewer.shot("now")
    see(f"vmpage[{pid}] live, and the chart")


def edit(viewer: Viewer) -> None:
    """Edit a rule with a mistake and then right. Save it, and see a match."""
    browser, guest = viewer.browser, viewer.guest
    browser.click("nav a", "Rules")
    browser.see("of 4", "tbody")
    browser.click("button", "Edit")
    browser.see("No mistakes", ".alert")
    new = (
        "rules:\n  - name: page-edited\n    events: [nonzero_exit]\n    match: {comm: 'vmpage*'}\n"
        "    record: [exe, cmdline, unit]\n"
    )
    viewer.edit(new.replace("record", "records"))
    browser.see("1 mistake", ".alert")
    mistake = browser.text(".problems")
    viewer.edit(new)
    browser.see("No mistakes", ".alert")
    browser.wait_for("Save and load", browser.find("button", "Save and load").is_enabled)
    browser.click("button", "Save and load")
    browser.see("1 rule is in force", ".alert")
    see(f"a mistake in the editor ({mistake.splitlines()[0]!r}), then saved and loaded")
    unit = guest.do("unit_death")
    browser.click("nav a", "Now")
    browser.see("vmpage-unit", "tbody")
    if unit not in browser.text("tbody"):  # emulated, the daemon may read /proc too late; the record then has null
        guest.do("unit_death")
        browser.see(unit, "tbody")
    browser.click("tbody tr:first-child td a", ":")
    browser.see("fires", ".badge")
    viewer.shot("match")
    see(f"a match of {unit}, and why it fired")


def follow(viewer: Viewer, label: str, address: str, text: str) -> None:
    """Click on a button of the page that leads to another page of Cockpit. See the text there, and come back."""
    browser = viewer.browser
    browser.click("button", label)
    browser.driver.switch_to.default_content()
    browser.wait_for(address, lambda: address in str(browser.driver.current_url))
    browser.driver.switch_to.frame(browser.find(f"iframe[name$='localhost{address.split('#')[0]}']"))
    browser.see(text)
    browser.driver.switch_to.default_content()
    browser.click("nav a", "Process events")
    viewer.enter()


def links(viewer: Viewer) -> None:
    """Follow the links of a match to Cockpit's page of the unit and to its journal."""
    match = str(viewer.browser.script("return location.hash")).removeprefix("#")
    follow(viewer, "Unit vmpage.service", "/system/services#/vmpage.service", "vmpage.service")
    viewer.browser.go(match)
    follow(viewer, "Journal of the unit", "/system/logs#/?", "written by vmpage")
    see("Cockpit's page of the unit, and the journal of the unit")


def record(viewer: Viewer) -> None:
    """See the busiest programs, and make a recording."""
    browser, guest = viewer.browser, viewer.guest
    browser.go("/record")
    browser.click("button", "Start")
    browser.see("events a second", "main p")
    browser.click("button", "Stop")
    browser.click("section[aria-label=Recording] button", "Record")
    browser.see("s left")
    pid = guest.do("death")
    browser.click("section[aria-label=Recording] button", "Stop")
    browser.see("Exit records")
    browser.click("button", "Replay against the rule files")
    browser.see(f"vmpage[{pid}]", "section[aria-label=Recording] tbody")
    browser.click("button", "Delete the recording")
    see("the busiest programs; a recording, replayed")


def stopped(viewer: Viewer) -> None:
    """Stop the service in the guest, and start it in the page."""
    browser, guest = viewer.browser, viewer.guest
    browser.go("/")
    browser.see("watching", ".tiles")
    guest.do("stop")
    browser.see("cnprocd is not running")
    browser.click("button", "Start cnprocd")
    browser.see("watching", ".tiles")
    see(f"stopped by systemctl and started by the page: {guest.do('active')}")


def not_installed(viewer: Viewer) -> None:
    """Remove the package while the page is open, and install it again."""
    browser, guest = viewer.browser, viewer.guest
    guest.do("remove")
    browser.see("cnprocd is not installed", "main")
    browser.see("Install the package cnprocd", "main")
    viewer.shot("not-installed")
    guest.do("install_again")
    browser.see("cnprocd is not running", "main")
    browser.click("button", "Start cnprocd")
    browser.see("watching", ".tiles")
    pid = guest.do("death")
    browser.see(f"[{pid}]", "tbody")
    see("removed: not installed, and what to do; installed again: started by the page, without a reload of the page")


def limited(viewer: Viewer) -> None:
    """Give administrative access back while the service runs."""
    browser = viewer.browser
    browser.driver.switch_to.default_content()
    browser.click("button", "Administrative access")
    browser.click("[role=dialog] button", "Limit access")
    browser.find("button", "Limited access")
    viewer.enter()
    browser.see("You may not see this", "main")
    viewer.shot("no-permission")
    see("administrative access given back: no data, and what to do")


STEPS = (not_running, live, edit, links, record, stopped, not_installed, limited)


def payload(name: str, scratch: Path) -> Path:
    """Return the disk with the packages, the agent, and the steps of this directory."""
    files = drive.packages(name, scratch)
    files |= {path.name: path for path in (ROOT / "tests/vm/guest").glob("*.py")}
    files["steps.py"] = HERE / "guest_steps.py"
    return pack_payload(scratch / "payload.tar", files)


def use(guest: Guest, name: str) -> None:
    """Take the steps of one guest."""
    viewer = Viewer(guest, name)
    try:
        viewer.log_in()
        for step in STEPS:
            print(f"{name}: {step.__name__}: {(step.__doc__ or '').splitlines()[0]}", flush=True)
            began_s = time.monotonic()
            step(viewer)
            print(f"    ok, {time.monotonic() - began_s:.0f} s", flush=True)
        if errors := [one for one in viewer.browser.errors() if "/cnprocd/" in one]:
            raise AssertionError(f"errors of the page on the console of the browser: {errors}")
    except BaseException:
        viewer.browser.driver.save_screenshot(str(OUTPUT / f"failed-vm-{name}.png"))
        print(guest.step("diagnose", 60)["detail"], flush=True)
        raise
    finally:
        viewer.browser.close()


def take_through(name: str) -> None:
    base = image.RECIPES[name]
    recipe = replace(base, name=f"page-{name}", packages=(*base.packages, *COCKPIT))
    disk = image.obtain(recipe)
    with tempfile.TemporaryDirectory(prefix="cnprocd-page-vm-") as directory:
        scratch = Path(directory)
        guest = Guest(disk, payload(name, scratch), scratch)
        guest.port = free_port()
        began_s = time.monotonic()
        with guest:
            guest.wait_boot()
            print(f"{name}: booted in {time.monotonic() - began_s:.0f} s: {guest.do('boot')}", flush=True)
            print(f"    cockpit {guest.do('console')}", flush=True)
            print(f"    installed by apt-get: {guest.do('install')}", flush=True)
            use(guest, name)
    print(f"{name}: all steps passed in {time.monotonic() - began_s:.0f} s; see .page/vm-{name}-*.png", flush=True)


def main() -> int:
    OUTPUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("debian12", "debian13"):
        take_through(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
