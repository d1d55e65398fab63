"""A private machine for the page: cnprocd, Cockpit and a browser on loopback, in a mount namespace of its own.

enter() gives this process private copies of /etc, /run, /var/lib, /usr/local/bin and /usr/share/cockpit, so that the
page finds everything at its standard place and the machine keeps what it has. cockpit-ws starts the bridge without a
login (--local-session), as root, as a member of the group cnprocd, or as another user.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException, StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
RULES = Path("/etc/cnprocd/rules.yaml")
SOCKET = Path("/run/cnprocd/control.sock")
GROUP, VIEWER, STRANGER, ORACLE = 64901, 64902, 64903, 64904  # ids of the private /etc
BRIDGES = {
    "root": "exec cockpit-bridge",
    "viewer": f"exec setpriv --reuid {VIEWER} --regid {VIEWER} --groups {GROUP} cockpit-bridge",
    "stranger": f"exec setpriv --reuid {STRANGER} --regid {STRANGER} --clear-groups cockpit-bridge",
}
_PRIVATE = ("/etc", "/run", "/var/lib", "/usr/local/bin", "/usr/share/cockpit")
_CLONE_NEWNS = 0x00020000
# Without these Chromium looks up hosts at every start.
_OFFLINE = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()


def enter() -> Path:
    """Move this process to a mount namespace with private copies. Return an empty directory that ends with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    place = Path(tempfile.mkdtemp(prefix="cnptest-page-"))
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "cnptest", str(place))
    closed = {
        str(parent)
        for path in (Path(sys.executable), Path(sys.executable).resolve(), ROOT / "cnprocd")
        for parent in path.parents
        if parent.stat().st_mode & 0o005 != 0o005
    }  # the test users run this Python
    for number, directory in enumerate((*_PRIVATE, *sorted(closed))):
        upper, work = place / f"upper{number}", place / f"work{number}"
        upper.mkdir(mode=0o755)
        work.mkdir()
        _run("mount", "-t", "overlay", "-o", f"lowerdir={directory},upperdir={upper},workdir={work}", "own", directory)
    _furnish()
    return place


def _furnish() -> None:
    """Install what the packages install: the page, the command, the group; and the bridges of the test users."""
    for path in ("/etc/cnprocd", "/run/cnprocd", "/var/lib/cnprocd"):
        shutil.rmtree(path, ignore_errors=True)
        Path(path).mkdir(mode=0o755)
    shutil.rmtree("/usr/share/cockpit/cnprocd", ignore_errors=True)
    shutil.copytree(ROOT / "packaging/cockpit", "/usr/share/cockpit/cnprocd")
    scripts = {"cnprocctl": f'exec {sys.executable} -m cnprocd.cli.cnprocctl "$@"'}
    scripts |= {f"cnptest-bridge-{name}": command for name, command in BRIDGES.items()}
    for name, command in scripts.items():
        script = Path("/usr/local/bin") / name
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    with open("/etc/group", "a") as groups, open("/etc/passwd", "a") as users:
        groups.write(f"cnprocd:x:{GROUP}:viewer\nviewer:x:{VIEWER}:\nstranger:x:{STRANGER}:\noracle:x:{ORACLE}:\n")
        for name, uid in (("viewer", VIEWER), ("stranger", STRANGER), ("oracle", ORACLE)):
            users.write(f"{name}:x:{uid}:{uid}::/tmp:/bin/sh\n")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_for(what: str, found: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Return when `found()` is true. Raises AssertionError after PATIENCE_S."""
    deadline = time.monotonic() + patience_s
    while not found():
        if time.monotonic() > deadline:
            raise AssertionError(f"not seen within {patience_s:g} s: {what}")
        time.sleep(0.02)


class Daemon:
    """cnprocd with its standard files: that of this source, or `command`."""

    def __init__(self, log: Path, command: Sequence[str] = (), socket: Path = SOCKET) -> None:
        self._log = log
        self._command = command or [sys.executable, "-m", "cnprocd.cli.cnprocd"]
        self._socket = socket
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self._log.open("ab")
        self._process = subprocess.Popen([*self._command, "--log-format", "json"], stdout=log, stderr=log, cwd=ROOT)
        process = self._process

        def connects() -> bool:
            assert process.poll() is None, self._log.read_text()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
                one.connect(str(self._socket))
                return True
            return False

        wait_for("cnprocd answers", connects)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE_S)
            self._process = None


@contextlib.contextmanager
def cockpit(user: str, log: Path, root: Path = Path("/")) -> Iterator[str]:
    """Run cockpit-ws of a root directory for this user. Yield its address."""
    port = free_port()
    command = [
        "chroot", str(root), _cockpit_ws(root), "--address=127.0.0.1", f"--port={port}", "--no-tls",
        f"--local-session=/usr/local/bin/cnptest-bridge-{user}",
    ]  # fmt: skip
    home = root / f"var/lib/cnptest-home-{user}"
    home.mkdir(mode=0o777, exist_ok=True)
    home.chmod(0o777)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "HOME": f"/tmp/cnptest-home-{user}"}
        )
    try:
        wait_for("cockpit-ws answers", lambda: _answers(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _cockpit_ws(root: Path) -> str:
    places = ("usr/lib/cockpit/cockpit-ws", "usr/libexec/cockpit-ws")
    found = next((f"/{path}" for path in places if (root / path).exists()), None)
    assert found is not None, "cannot find cockpit-ws: apt install cockpit-ws"
    return found


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def see(text: str) -> None:
    """Print what was seen."""
    print(f"    seen: {text}", flush=True)


class Browser:
    """A headless Chromium, seen as its user sees it: texts, links, buttons and labels."""

    def __init__(self, size: tuple[int, int] = (1200, 900), patience_s: float = PATIENCE_S) -> None:
        self.patience_s = patience_s
        options = Options()
        options.accept_insecure_certs = True  # Cockpit of a virtual machine makes its own
        for one in (*_OFFLINE, f"--window-size={size[0]},{size[1]}"):
            options.add_argument(one)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))

    def close(self) -> None:
        self.driver.quit()

    def open(self, address: str, at: str = "/") -> None:
        """Open a view of the page."""
        self.driver.get("about:blank")
        with contextlib.suppress(NoAlertPresentException):  # of a page with unsaved changes
            self.driver.switch_to.alert.accept()
        self.driver.get(f"{address}/cockpit/@localhost/cnprocd/index.html#{at}")

    def go(self, at: str) -> None:
        self.driver.execute_script("location.hash = arguments[0]", at)

    def text(self, selector: str = "body") -> str:
        """Return what is written there, as a viewer reads it."""
        with contextlib.suppress(WebDriverException):
            return " ".join(one.text for one in self.driver.find_elements(By.CSS_SELECTOR, selector))
        return ""

    def wait_for(self, what: str, found: Callable[[], object]) -> None:
        """Return when `found()` is true. Raises AssertionError after the patience of this browser."""
        wait_for(what, found, self.patience_s)

    def see(self, text: str, selector: str = "body") -> None:
        """Wait until this text is visible."""
        try:
            self.wait_for(f"{text!r} in {selector}", lambda: text in self.text(selector))
        except AssertionError as error:
            raise AssertionError(f"{error}; there was:\n{self.text(selector)[:3000]}") from None

    def see_not(self, text: str, selector: str = "body") -> None:
        self.wait_for(f"no {text!r} in {selector}", lambda: text not in self.text(selector))

    def changed(self, selector: str, before: str) -> None:
        """Wait until something else than `before` is visible there."""
        self.wait_for(f"another text than {before!r}", lambda: self.text(selector) != before)

    def find(self, selector: str, text: str | None = None) -> WebElement:
        """Wait for a visible element with this text."""
        found: list[WebElement] = []

        def look() -> bool:
            with contextlib.suppress(StaleElementReferenceException):
                found[:] = [
                    one
                    for one in self.driver.find_elements(By.CSS_SELECTOR, selector)
                    if one.is_displayed() and (text is None or text in one.text)
                ]
            return bool(found)

        self.wait_for(f"{selector} {text or ''}", look)
        return found[0]

    def click(self, selector: str, text: str | None = None) -> None:
        """Click on the visible element with this text, once it can be clicked."""

        def clicked() -> bool:
            try:
                self.find(selector, text).click()
            except WebDriverException:
                return False
            return True

        self.wait_for(f"a click on {selector} {text or ''}", clicked)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, key by key."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def script(self, code: str, *arguments: object) -> object:
        found: object = self.driver.execute_script(code, *arguments)
        return found

    def picture(self, *files: Path) -> None:
        """Keep a screenshot, in few colours."""
        shown = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        for file in files:
            shown.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)

    def errors(self) -> list[str]:
        """Return the errors of the console: exceptions, refused scripts, missing files."""
        return [
            str(entry["message"])
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call, unused-ignore]
            if entry["level"] == "SEVERE" and "favicon" not in str(entry["message"])
        ]
