"""`make test-page`: use the Cockpit page in a browser, with the real daemon and real deaths; print what was seen.

    python tests/page/look.py [--screenshots DIRECTORY] [STEP...]

Needs root, the proc connector, cockpit-ws, cockpit-bridge, chromium and chromium-driver. Nothing outside loopback is
used, and nothing of the machine is changed: see console.py. A failed step leaves a screenshot in .page/ and its trace.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import care
from console import RULES, Browser, Daemon, cockpit, enter, see, wait_for
from deaths import HOSTILE, MARKUP, fail, fail_with_arguments, kill, waiting, write_history
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cnprocd.connector.listener import Listener
from cnprocd.errors import CnprocdError

OUTPUT = Path(__file__).resolve().parents[2] / ".page"
HOOK = Path("/usr/local/bin/free-what-it-held")
HOOK_MAY_SUCCEED = Path("/run/cnptest-hook-may-succeed")
PAST = 10_000
BURST = 500
RULES_TEXT = """\
settings: {hook_slots: 1}
rules:
  - name: oracle-process-died
    description: Free what a dead background process held
    events: [nonzero_exit]
    match: {user: oracle, comm: "ora_*", signal: SIGKILL}
    record: [exe, cmdline]
    log: {level: error, message: "{comm}[{pid}] died of {status}"}
    run: {command: [/usr/local/bin/free-what-it-held, --pid, "{pid}"], retries: 0}

  - name: oracle-failed
    description: Log every failed process of oracle
    events: [nonzero_exit]
    match: {user: oracle, exit_code: "1-127"}
    record: [exe, cmdline]
"""
HOOK_TEXT = f"""#!/bin/sh
echo "freeing what $CNPROCD_COMM held"
[ -e {HOOK_MAY_SUCCEED} ] || {{ echo "segment 4711 is busy" >&2; exit 3; }}
"""


class Page:
    """What the steps share: the daemon, the addresses of the page by user, and a browser."""

    def __init__(self, place: Path, shots: Path | None) -> None:
        self.place = place
        self.daemon = Daemon(place / "daemon.log")
        self.shots = shots
        self.addresses: dict[str, str] = {}
        self.browser = Browser(patience_s=60)

    @property
    def address(self) -> str:
        return self.addresses["root"]

    def open(self, at: str = "/") -> Browser:
        """Open a view as root."""
        self.browser.open(self.address, at)
        return self.browser

    def hook(self, text: str | None) -> None:
        """Replace the program of the hook; None: as it was at first."""
        HOOK.write_text(text or HOOK_TEXT)

    def shot(self, name: str, styles: Sequence[str] = ("light", "dark")) -> None:
        """Keep a screenshot, light and dark."""
        for style in styles:
            self._style(style)
            OUTPUT.mkdir(exist_ok=True)
            self.browser.picture(*(one / f"{name}-{style}.png" for one in (OUTPUT, self.shots) if one is not None))
        self._style("auto")

    def _style(self, style: str) -> None:
        """Choose a style as Cockpit's menu does."""
        self.browser.script(
            "localStorage.setItem('shell:style', arguments[0]);"
            "window.dispatchEvent(new CustomEvent('cockpit-style', {detail: {style: arguments[0]}}))",
            style,
        )


# -- the steps, in order


def first_view(page: Page) -> None:
    """Open the page with 10,000 past matches."""
    browser = page.open()
    browser.see("watching", ".tiles")
    took_ms = browser.script("return performance.timing.loadEventEnd - performance.timing.navigationStart")
    browser.see("worker-failed", "tbody")
    rows = browser.script("return document.querySelectorAll('main tbody tr').length")
    assert isinstance(rows, int) and rows <= 300, rows
    browser.see("2 in force", ".tiles")
    browser.see("others" if "others" in browser.text(".legend") else "worker-failed", ".legend")
    drawn = browser.script("return document.querySelectorAll('svg.chart rect').length")
    assert isinstance(drawn, int) and drawn > 100, drawn
    others = browser.script(
        "return performance.getEntries().map(one => one.name).filter(name => name.includes('://') &&"
        " !name.startsWith(location.origin))"
    )
    assert others == [], others
    see(f"Now with {PAST:,} past matches: loaded in {took_ms} ms, {rows} rows, {drawn} bars in the chart")
    for by, wanted in (("unit", "jobs.service"), ("kind of event (deaths)", "nonzero_exit"), ("rule", "worker-failed")):
        browser.click(".toolbar select option", by)
        browser.see(wanted, ".legend")
    see("the chart by unit, by kind of event and by rule")
    for _ in range(5):
        before = browser.text("main p.muted")
        browser.click("button", "Older matches")
        browser.changed("main p.muted", before)
    note = browser.find("p.muted", "are shown").text
    see(f"more than is drawn: {note!r}")
    browser.type("input[type=search]", "ora_pmon")
    browser.see("ora_pmon_PROD", "tbody")
    browser.see_not("ora_worker", "tbody")
    see("the filter")


def live(page: Page) -> None:
    """See a kill within a second, pause, and go on."""
    browser = page.open()
    browser.see("watching", ".tiles")
    browser.find("tbody tr")
    times = []
    for _ in range(5):
        pid = waiting("ora_pmon_LIVE")
        browser.script(
            "window.seen = 0; const wanted = arguments[0]; const look = () => {"
            " if (document.querySelector('tbody').textContent.includes(wanted)) window.seen = Date.now();"
            " else requestAnimationFrame(look) }; look()",
            f"ora_pmon_LIVE[{pid}]",
        )
        at_s = kill(pid)
        wait_for("the kill", lambda: browser.script("return window.seen"))
        seen_ms = browser.script("return window.seen")
        assert isinstance(seen_ms, int)
        times.append(seen_ms / 1000 - at_s)
    assert min(times) < 1, times
    see("five kills live, after " + ", ".join(f"{one * 1000:.0f}" for one in times) + " ms")
    browser.click("button", "Pause")
    browser.see("Resume (0 new)")
    fail("ora_paused")
    browser.see("Resume (1 new)")
    assert "ora_paused" not in browser.text("tbody")
    browser.click("button", "Resume")
    browser.see("ora_paused", "tbody")
    title = browser.find("tbody time").get_attribute("title") or ""
    assert "Z" in title and ":" in title, title
    see(f"pause and resume; a time in the browser's zone, exact on hover: {title.splitlines()!r}")
    page.shot("now")


def one_match(page: Page) -> None:
    """Open a match: record, job, output, reasons."""
    browser = page.open()
    pid, began_s = waiting("ora_pmon_ONE"), time.monotonic()
    # A child that changed its user is read from /proc before its program is known: at the latest at the next tick.
    wait_for("a tick of the daemon", lambda: time.monotonic() > began_s + 2.0)
    kill(pid)
    browser.see(f"ora_pmon_ONE[{pid}]", "tbody")
    browser.click("tbody tr:first-child td a", ":")
    browser.see("fires")
    browser.see("SIGKILL", "section[aria-label='Why it fired']")
    browser.see("freeing what ora_pmon_ONE held", "pre")
    browser.see("segment 4711 is busy", "pre")
    browser.see("dead", "section[aria-label=Job]")
    browser.see("Journal of the program")
    see("a match with its record, its dead job with output, why it fired, and links")
    page.shot("match")


def hostile(page: Page) -> None:
    """Names and arguments that try to be markup, escapes or right-to-left text are text."""
    browser = page.open()
    browser.see("watching", ".tiles")
    for comm in HOSTILE.values():
        fail(comm, 5)
    pid = fail_with_arguments(MARKUP, "\u202egpj.exe", "x" * 100_000)
    for text in ("<img src=x>", "\\x1b[31mred", "a\\u202egpj.x", "\\xff\\xfebin"):
        browser.see(text, "tbody")
    browser.see(f"sh[{pid}]", "tbody")
    browser.click("tbody tr:first-child td a", ":")
    browser.see(MARKUP, "dd")
    browser.see("\\u202egpj.exe", "dd")
    browser.find("dd", "x" * 3000)
    wide = browser.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, f"the page is {wide} pixels too wide"
    assert browser.driver.title == "Process events"
    assert browser.script("return document.querySelectorAll('img, main script').length") == 0
    see(f"hostile names as text: {', '.join(HOSTILE)}; markup and 100 kB in arguments; no element came of it")


def rules(page: Page) -> None:
    """See what is in force with hits and price; disable for a time, enable."""
    browser = page.open("/rules")
    browser.see("oracle-process-died", "tbody")
    browser.see("of 4", "tbody")
    browser.see("rules.yaml:3", "tbody")
    period = "select[aria-label='How long oracle-failed is disabled']"
    browser.find(period).send_keys(Keys.DOWN)
    browser.script("document.activeElement.blur()")
    before = browser.text("tbody")
    fail("ora_hit")
    browser.changed("tbody", before)  # drawn again with the new number of hits
    assert browser.find(period).get_attribute("value") == "1h"
    assert "disabled until" not in browser.text("tbody")
    browser.find("button[aria-label='Disable oracle-failed']").send_keys(Keys.ENTER)
    browser.see("disabled until", "tbody")
    until = browser.find("tbody tr", "disabled until").text.splitlines()
    browser.find("button[aria-label='Enable oracle-failed']").send_keys(Keys.ENTER)
    browser.see_not("disabled until", "tbody")
    see(f"rules with hits, price and place; disabled for an hour and enabled again by keyboard: {until!r}")
    page.shot("rules")
    browser.click("tbody a", "oracle-process-died")
    browser.see("retries: 0", "pre")
    browser.see("Identity", "dl")
    see("one rule with all its defaults")


def _type(browser: Browser, text: str) -> None:
    """Replace what is in the editor, as one who types and pastes does."""
    area = browser.find("textarea")
    area.send_keys(Keys.CONTROL, "a")
    browser.script(
        "const area = arguments[0]; area.setRangeText(arguments[1], 0, area.value.length, 'end');"
        "area.dispatchEvent(new Event('input'))",
        area,
        text,
    )


def edit(page: Page) -> None:
    """Edit a rule with a mistake and then right, try it on the past, save it."""
    browser = page.open("/edit")
    browser.see("No mistakes", ".alert")
    _type(
        browser,
        RULES_TEXT.replace(
            "events: [nonzero_exit]\n    match: {user: oracle, exit",
            "events: [nonzero_exits]\n    match: {user: oracle, exit",
        ),
    )
    browser.see("1 mistake", ".alert")
    browser.see('did you mean "nonzero_exit"', ".problems")
    marked = browser.find(".lines .bad").text
    assert marked == "13", marked
    assert not browser.find("button", "Save and load").is_enabled()
    see(f"a mistake at its line ({marked}) as one types, with what would be accepted; it cannot be saved")
    page.shot("edit")
    browser.click("button", "line 13")
    assert browser.script("return document.activeElement.tagName") == "TEXTAREA"
    new = RULES_TEXT.replace('exit_code: "1-127"', 'exit_code: "4-127"')
    _type(browser, new)
    browser.see("No mistakes", ".alert")
    browser.click("button", "Try on past matches")
    browser.see("other rules would fire for", "main p")
    browser.see("(no longer)", "tbody tr:first-child")
    see(f"the new rules on past matches: {browser.find('p', 'other rules').text.split(';')[1].split('.')[0].strip()!r}")
    browser.script("arguments[0].scrollIntoView()", browser.find("h2", "On past matches"))
    page.shot("trial")
    browser.script("scrollTo(0, 0)")
    assert RULES.read_text() == RULES_TEXT
    wait_for("Save and load", browser.find("button", "Save and load").is_enabled)
    browser.click("button", "Save and load")
    browser.see("2 rules are in force", ".alert")
    assert RULES.read_text() == new
    pid = fail("ora_three", 3), fail("ora_five", 5)
    browser.go("/")
    browser.see(f"ora_five[{pid[1]}]", "tbody")
    assert f"ora_three[{pid[0]}]" not in browser.text("tbody")
    see("saved and loaded: exit code 3 no longer matches, 5 does")


def refused(page: Page) -> None:
    """A reload that is refused changes nothing and shows why."""
    good = RULES.read_text()
    RULES.write_text(good.replace("nonzero_exit", "died"))
    browser = page.open("/rules")
    browser.see("differ from the rules in force", ".alert")
    browser.click("button", "Reload")
    browser.see("The reload was refused", ".alert")
    browser.see("unknown event", ".problems")
    pid = fail("ora_kept", 5)
    browser.go("/")
    browser.see(f"ora_kept[{pid}]", "tbody")
    browser.see("last reload failed", ".tiles")
    RULES.write_text(good)
    browser.go("/rules")
    browser.click("button", "Reload")
    browser.see("2 rules are in force", ".alert")
    see("a refused reload with its reason; the rules in force went on")


def two_tabs(page: Page) -> None:
    """Two tabs edit one file: the second one does not overwrite the first by accident."""
    browser = page.open("/edit")
    browser.see("No mistakes", ".alert")
    text = RULES.read_text()
    _type(browser, text + "# of the first tab\n")
    RULES.write_text(text + "# of another tab\n")
    browser.see("No mistakes", ".alert")
    wait_for("Save and load", browser.find("button", "Save and load").is_enabled)
    browser.click("button", "Save and load")
    browser.see("was changed by another program", ".alert")
    assert RULES.read_text().endswith("# of another tab\n")
    browser.click("button", "Overwrite it")
    browser.see("2 rules are in force", ".alert")
    assert RULES.read_text().endswith("# of the first tab\n")
    see("a file that another tab has changed is not overwritten unless asked")


def jobs(page: Page) -> None:
    """Retry a dead job, kill a running one, drop a waiting one."""
    kill(waiting("ora_pmon_JOB"))
    browser = page.open("/jobs")
    browser.see("dead", "tbody")
    page.shot("jobs")
    HOOK_MAY_SUCCEED.touch()
    row = browser.find("tbody tr", "dead")
    number = row.find_elements(By.CSS_SELECTOR, "a")[0].text
    browser.click(f"button[aria-label='Retry job {number}']")
    browser.see("succeeded", "tbody")
    browser.go(f"/jobs/{number}")
    browser.see("done")
    browser.see("Attempts\n2", "dl")
    see(f"job {number} retried: it ran again and succeeded")
    page.hook("#!/bin/sh\necho waiting for a lock\nexec sleep 600\n")
    kill(waiting("ora_pmon_SLOW"))
    kill(waiting("ora_pmon_NEXT"))
    browser.go("/jobs")
    browser.click("tbody button", "Drop")
    browser.click("dialog button", "Drop it")
    browser.see("dropped by an operator", "tbody")
    browser.click("tbody button", "Kill")
    browser.see("get SIGTERM", "dialog")
    browser.click("dialog button", "Cancel")
    browser.see("running", "tbody")
    browser.click("tbody button", "Kill")
    browser.click("dialog button", "Kill it")
    browser.see("killed by an operator", "tbody")
    page.hook(None)
    see("a waiting job dropped; a running hook killed, after the question was answered with Cancel once")


def record(page: Page) -> None:
    """See the busiest programs live; record, and replay against edited rules that are not saved."""
    before = set(Path("/var/tmp").glob("cnprocd-recording.*"))
    browser = page.open("/edit")
    browser.see("No mistakes", ".alert")
    _type(browser, "rules:\n  - {name: draft-only, events: [nonzero_exit], match: {comm: ora_recorded}}\n")
    browser.see("No mistakes", ".alert")
    browser.go("/record")
    browser.click("button", "Start")
    browser.see("events a second")
    fail("ora_busy")
    browser.see("Execs", "thead")
    browser.click("button", "Stop")
    browser.script("document.querySelector('section[aria-label=Recording] select').value = '300s'")
    browser.click("button", "Record")
    browser.see("s left")
    pid = fail("ora_recorded", 7)
    browser.click("section[aria-label=Recording] button", "Stop")
    browser.see("Exit records")
    browser.click("button", "Replay against the edited rules.yaml")
    browser.see("draft-only", "tbody")
    browser.see(f"ora_recorded[{pid}]")
    see("the busiest programs; a recording, replayed against edited rules that are not saved")
    page.shot("record")
    browser.go("/edit")
    text = "return document.querySelector('textarea').value"
    wait_for("the editor with the draft", lambda: "draft-only" in str(browser.script(text)))
    kept = browser.script(text)
    browser.go("/edit?file=/etc/cnprocd/rules.d/other.yaml")
    browser.click("dialog button", "Cancel")
    wait_for("the draft", lambda: browser.script(text) == kept)
    see("after Cancel the draft is still there")
    browser.click("button", "Undo all changes")
    browser.click("dialog button", "Discard")
    browser.see("2 rules in all files")
    browser.go("/record")
    browser.click("button", "Delete the recording")
    wait_for("the recording is gone", lambda: set(Path("/var/tmp").glob("cnprocd-recording.*")) <= before)


def read_only(page: Page) -> None:
    """A member of the group cnprocd sees all and changes nothing; others see what to do."""
    kill(waiting("ora_pmon_READ"))
    browser = page.browser
    browser.open(page.addresses["viewer"], "/")
    browser.see("Read only", "header")
    browser.see("ora_pmon_READ", "tbody")
    browser.go("/jobs")
    browser.find("tbody tr")
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "tbody button")
    browser.go("/rules")
    browser.see("of 4", "tbody")
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "tbody select")
    browser.go("/edit")
    browser.see("turn on administrative access")
    browser.see("No mistakes", ".alert")
    assert browser.find("textarea").get_attribute("readonly")
    browser.go("/record")
    browser.see("Administrative access needed")
    see("a member of the group cnprocd: everything to read, nothing to change, and why")
    browser.open(page.addresses["stranger"], "/")
    browser.see("You may not see this")
    see("another user: no data, and what to do")
    page.shot("no-permission")


def stopped(page: Page) -> None:
    """Stop the daemon and start it again: the page says so, and goes on by itself."""
    browser = page.open()
    browser.see("watching", ".tiles")
    page.daemon.stop()
    browser.see("cnprocd is not running")
    browser.find("button", "Start cnprocd")
    page.shot("not-running")
    program = Path("/usr/local/bin/cnprocctl")
    removed = program.rename("/usr/local/bin/cnptest-removed")
    browser.see("cnprocd is not installed")
    browser.see("Install the package cnprocd")
    assert "Start cnprocd" not in browser.text("button")
    page.shot("not-installed")
    removed.rename(program)
    browser.see("cnprocd is not running")
    see("the program removed while the page is open: not installed; then put back")
    browser.go("/edit")
    browser.see("No mistakes", ".alert")
    browser.go("/")
    page.daemon.start()
    browser.see("watching", ".tiles")
    pid = fail("ora_again", 6)
    browser.see(f"ora_again[{pid}]", "tbody")
    see("the daemon stopped and started: what to do, then live again without a click; the editor checks meanwhile")


def narrow(page: Page) -> None:
    """A narrow screen, the keyboard, and names for a screen reader."""
    browser = page.open()
    size = {"width": 320, "height": 800, "deviceScaleFactor": 1, "mobile": False}  # WCAG 2.1, criterion 1.4.10
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        views = {
            "/": "svg.chart",
            "/rules": "td select",
            "/edit": ".alert.ok",
            "/jobs": "td a",
            "/record": "td, .muted",
        }
        for at, shown in views.items():
            browser.go(at)
            browser.find(shown)
            wide = browser.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0, f"{at} is {wide} pixels too wide"
            nameless = browser.script(
                "return [...document.querySelectorAll('button, input, select, textarea, a')].filter(one => !("
                "one.textContent.trim() || one.getAttribute('aria-label') || one.closest('label'))).length"
            )
            assert nameless == 0, f"{at} has {nameless} controls without a name"
        browser.go("/")
        browser.see("watching", ".tiles")
        browser.find("svg.chart")
        page.shot("narrow")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser = page.open()
    browser.see("watching", ".tiles")
    for _ in range(3):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for("Jobs by keyboard", lambda: browser.script("return location.hash") == "#/jobs")
    see("320 pixels wide without scrolling sideways; every control has a name; views by keyboard")


def burst(page: Page) -> None:
    """Many deaths at once while the page is open."""
    browser = page.open()
    browser.see("watching", ".tiles")
    browser.script(
        "window.longest = 0; let last = performance.now(); const tick = () => { const now = performance.now();"
        " window.longest = Math.max(window.longest, now - last); last = now; requestAnimationFrame(tick) }; tick()"
    )
    for _ in range(BURST):
        fail("ora_burst", 9)
    pid = fail("ora_last", 9)
    browser.see(f"ora_last[{pid}]", "tbody")
    rows = browser.script("return document.querySelectorAll('main tbody tr').length")
    assert isinstance(rows, int) and rows <= 300, rows
    longest_ms = browser.script("return Math.round(window.longest)")
    see(f"{BURST} deaths while the page was open: {rows} rows, longest frame {longest_ms} ms")


def in_cockpit(page: Page) -> None:
    """Find the page in Cockpit's menu, and follow its address."""
    if not Path("/usr/share/cockpit/shell").exists():
        see("nothing: cockpit-system is not installed")
        return
    browser = page.browser
    browser.driver.get(f"{page.address}/cnprocd")
    browser.see("Process events", "nav")
    browser.driver.switch_to.frame(browser.find("iframe[name$='localhost/cnprocd']"))
    try:
        browser.see("watching", ".tiles")
        browser.find("svg.chart")
        page.shot("cockpit", ("light",))
        browser.click("a", "Rules")
        browser.see("oracle-process-died", "tbody")
        browser.driver.switch_to.default_content()
        wait_for("the address", lambda: str(browser.driver.current_url).endswith("/cnprocd#/rules"))
    finally:
        browser.driver.switch_to.default_content()
        browser.errors()  # those of Cockpit's own pages, which miss systemd and D-Bus here
    see("the page in Cockpit's menu, in its frame; the address of a view in the address bar")


STEPS: tuple[Callable[[Page], None], ...] = (
    first_view, in_cockpit, live, one_match, hostile, rules, edit, refused, two_tabs, jobs, record, read_only, stopped,
    narrow, burst, *care.STEPS,
)  # fmt: skip


def cannot_run() -> str | None:
    """Return why the page cannot be used on this machine at all, or None."""
    if os.geteuid() != 0:
        return "it needs root"
    missing = [name for name in ("cockpit-bridge", "chromedriver", "chromium", "setpriv") if not shutil.which(name)]
    if missing:
        return f"cannot find {', '.join(missing)}"
    try:
        listener = Listener.open(1 << 20)
        listener.subscribe(0.5)
        listener.unsubscribe()
        Browser().close()
    except CnprocdError as error:
        return f"no proc connector here: {error}"
    except WebDriverException as error:
        return f"cannot start the browser: {error.msg}"
    with tempfile.TemporaryDirectory(prefix="cnptest-page-") as place:
        mounts = 'mount -t tmpfs own "$1" && cd "$1" && mkdir u w'
        overlay = "mount -t overlay -o lowerdir=/etc,upperdir=u,workdir=w own /etc"
        command = ["unshare", "--mount", "sh", "-c", f"{mounts} && {overlay}", "sh", place]
        done = subprocess.run(command, capture_output=True, text=True)
    return f"cannot mount an overlay: {done.stderr.strip()}" if done.returncode else None


@contextlib.contextmanager
def furnished(shots: Path | None) -> Iterator[Page]:
    """Start all that the steps need."""
    place = enter()
    HOOK.write_text(HOOK_TEXT)
    HOOK.chmod(0o755)
    RULES.write_text(RULES_TEXT)
    write_history(Path("/var/lib/cnprocd"), PAST, 3)
    with contextlib.ExitStack() as stack:
        page = Page(place, shots)
        stack.callback(page.browser.close)
        stack.callback(page.daemon.stop)
        page.daemon.start()
        for user in ("root", "viewer", "stranger"):
            page.addresses[user] = stack.enter_context(cockpit(user, place / "cockpit.log"))
        try:
            yield page
        finally:
            OUTPUT.mkdir(exist_ok=True)
            for log in ("cockpit.log", "daemon.log"):
                (OUTPUT / log).write_bytes((place / log).read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description="Use the Cockpit page in a real browser.")
    parser.add_argument("--screenshots", type=Path, help="Keep the screenshots in this directory as well")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(step.__name__ for step in STEPS))
    options = parser.parse_args()
    shots = options.screenshots.resolve() if options.screenshots else None
    if reason := cannot_run():
        print(f"make test-page skipped: {reason}")
        return 0
    failed = []
    with furnished(shots) as page:
        for step in STEPS:
            if options.steps and step.__name__ not in options.steps:
                continue
            print(f"{step.__name__}: {(step.__doc__ or '').splitlines()[0]}", flush=True)
            began_s = time.monotonic()
            try:
                step(page)
                if errors := page.browser.errors():
                    raise AssertionError(f"errors on the console of the browser: {errors}")
                print(f"    ok, {time.monotonic() - began_s:.1f} s", flush=True)
            except Exception:
                failed.append(step.__name__)
                traceback.print_exc()
                OUTPUT.mkdir(exist_ok=True)
                page.browser.driver.save_screenshot(str(OUTPUT / f"failed-{step.__name__}.png"))
                print(f"    FAILED: see {OUTPUT}/failed-{step.__name__}.png", flush=True)
    print(f"{len(failed)} steps failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
