"""`make test-page-debian`: the page in the Cockpit of Debian 12 and of Debian 13, all installed from packages.

For each release: a tree with its Cockpit (mmdebstrap, kept in .page/), the package of this source installed in it with
dpkg, its daemon started, its Cockpit started, the page opened in the browser of this machine, and a screenshot. The
trees share the kernel of this machine. Needs what look.py needs, and mmdebstrap.

    python tests/page/suites.py [bookworm] [trixie]
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from console import BRIDGES, ORACLE, Browser, Daemon, cockpit, enter
from deaths import kill, waiting

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / ".page"
SUITES = {"bookworm": "debian12-x86_64", "trixie": "debian13"}
COMMON = ("systemd", "cockpit-ws", "cockpit-bridge", "python3", "util-linux")
OWN = {"bookworm": (), "trixie": ("python3-pydantic", "python3-structlog", "python3-sdnotify", "python3-yaml")}
RULES = f"""\
rules:
  - name: died
    description: Every process of a user that dies
    events: [nonzero_exit]
    match: {{user: {ORACLE}}}
"""


def tree_of(suite: str) -> Path:
    """Return the tree of a release with its Cockpit, made once."""
    sys.path.insert(0, str(ROOT / "tests/vm"))
    image = importlib.import_module("image")
    tree = OUTPUT / f"tree-{suite}"
    if not tree.exists():
        made = OUTPUT / f"new-{suite}"
        options = (*image.host_apt_options(), "Apt::Install-Recommends false")
        _run(
            "mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join((*COMMON, *OWN[suite]))}",
            *(f"--aptopt={option}" for option in options), suite, str(made),
            f"deb {image.host_mirror()} {suite} main",
        )  # fmt: skip
        made.rename(tree)
    return tree


def package_of(suite: str) -> Path:
    """Build the package of a release."""
    sys.path.insert(0, str(ROOT / "packaging"))
    builder = importlib.import_module("build")
    made: Path = builder.build(builder.PACKAGES[SUITES[suite]], OUTPUT / "dist", builder.source_epoch())
    return made


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})


def install(place: Path, tree: Path, deb: Path) -> Path:
    """Return the root of a private copy of the tree, with the package installed."""
    root = place / f"root-{tree.name}"
    upper, work = place / f"upper-{tree.name}", place / f"work-{tree.name}"
    for directory in (root, upper, work):
        directory.mkdir()
    _run("mount", "-t", "overlay", "-o", f"lowerdir={tree},upperdir={upper},workdir={work}", "own", str(root))
    for name in ("proc", "dev"):
        _run("mount", "--bind", f"/{name}", str(root / name))
    (root / "tmp" / deb.name).write_bytes(deb.read_bytes())
    _run("chroot", str(root), "dpkg", "--install", f"/tmp/{deb.name}")
    bridge = root / "usr/local/bin/cnptest-bridge-root"
    bridge.write_text(f"#!/bin/sh\n{BRIDGES['root']}\n")
    bridge.chmod(0o755)
    for own in ("run/cnprocd", "var/lib/cnprocd"):
        (root / own).mkdir(exist_ok=True)
    (root / "etc/cnprocd/rules.yaml").write_text(RULES)
    return root


def look(browser: Browser, address: str) -> None:
    """See each view, and a kill live."""
    browser.open(address, "/")
    browser.see("watching", ".tiles")
    pid = waiting("ora_debian")
    kill(pid)
    browser.see(f"ora_debian[{pid}]", "tbody")
    browser.click("tbody tr:first-child td a", ":")
    browser.see("fires", ".badge")
    browser.go("/rules")
    browser.see("of 4", "tbody")
    browser.go("/edit")
    browser.see("No mistakes", ".alert")
    browser.click("button", "Try on past matches")
    browser.see("other rules would fire", "main p")
    browser.go("/jobs")
    browser.see("No jobs", ".empty")
    browser.go("/record")
    browser.click("button", "Start")
    browser.see("events a second", "main p")
    browser.click("button", "Stop")
    browser.find("button", "Start")
    browser.go("/")
    browser.find("svg.chart")
    if errors := browser.errors():
        raise AssertionError(f"errors on the console of the browser: {errors}")


def one_suite(suite: str, place: Path) -> None:
    root = install(place, tree_of(suite), package_of(suite))
    version = subprocess.run(
        ["chroot", str(root), "dpkg-query", "-W", "-f", "${Version}", "cockpit-ws"], capture_output=True, text=True
    ).stdout
    log = place / f"{suite}.log"
    daemon = Daemon(log, ["chroot", str(root), "cnprocd"], root / "run/cnprocd/control.sock")
    browser = Browser((1200, 800))
    try:
        daemon.start()
        with cockpit("root", log, root) as address:
            look(browser, address)
            browser.picture(OUTPUT / f"{suite}.png")
    except BaseException:
        print(log.read_text()[-2000:], file=sys.stderr)
        browser.driver.save_screenshot(str(OUTPUT / f"failed-{suite}.png"))
        raise
    finally:
        browser.close()
        daemon.stop()
    print(
        f"{suite}: cockpit {version}, package installed: every view, and a kill live; see .page/{suite}.png", flush=True
    )


def main() -> int:
    suites = sys.argv[1:] or list(SUITES)
    OUTPUT.mkdir(exist_ok=True)
    place = enter()
    for suite in suites:
        one_suite(suite, place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
