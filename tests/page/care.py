"""Steps of `make test-page` in which nothing may be lost, widened, hidden or left behind. See look.py."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from console import ORACLE, RULES, see, wait_for
from deaths import fail, kill, waiting, write_matches
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

if TYPE_CHECKING:
    from console import Browser
    from look import Page

DROPIN = Path("/etc/cnprocd/rules.d/cnptest.yaml")
MANY = 3000
AHEAD_S = 3600
BEHIND_MS = 20 * 60_000
HOSTILE_COMM, SHOWN_COMM = "ora_<b>\u202eg", "ora_<b>\\u202eg"
HOSTILE_UNIT = "a\u202egpj\u00ad.service"


def typed(browser: Browser, text: str) -> None:
    """Add a line at the end of what is in the editor."""
    browser.script(
        "const area = arguments[0]; area.setRangeText(arguments[1], area.value.length, area.value.length, 'end');"
        "area.dispatchEvent(new Event('input'))",
        browser.find("textarea"),
        text,
    )


def save(browser: Browser) -> None:
    """Save the edited file, once it was checked."""
    wait_for("Save and load", browser.find("button", "Save and load").is_enabled)
    browser.click("button", "Save and load")
    browser.see("in force", ".alert")


def command_lines() -> list[str]:
    """Return the command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return lines


def recorders() -> list[str]:
    """Return the command lines of all processes that record for a page."""
    return [line for line in command_lines() if "cnprocctl" in line and " record --hold " in line]


def recordings(page: Page) -> None:
    """Leave a recording in every way: nothing runs on, and nothing stays on the disk."""
    before = set(os.listdir("/var/tmp"))
    browser = page.open("/record")
    browser.click("button", "Record")
    browser.see("s left")
    assert set(os.listdir("/var/tmp")) == before
    browser.click("section[aria-label=Recording] button", "Stop")
    browser.see("Exit records")
    assert len(recorders()) >= 1
    page.open("/")
    wait_for("a kept recording ends with its page", lambda: not recorders())
    page.open("/record")
    browser.click("button", "Record")
    browser.see("s left")
    browser.open("about:blank#")
    wait_for("a running recording ends with its page", lambda: not recorders())
    page.open("/record")
    browser.click("button", "Record")
    browser.go("/jobs")
    browser.see("Jobs", "h2")
    page.open("/record")
    wait_for("a recording that was starting ends with its view", lambda: not recorders())
    assert set(os.listdir("/var/tmp")) == before
    see("recordings, kept, running and starting: gone with the page, and no file in /var/tmp at any time")
    program = Path("/usr/local/bin/cnprocctl")
    removed = program.rename("/usr/local/bin/cnptest-removed")
    browser.click("section[aria-label=Recording] button", "Record")
    browser.see("cnprocctl is not installed", ".alert")
    removed.rename(program)
    browser.click("section[aria-label=Recording] button", "Record")
    browser.see("s left")
    browser.click("section[aria-label=Recording] button", "Stop")
    browser.click("button", "Delete the recording")
    wait_for("a deleted recording is gone", lambda: not recorders())
    see("a recording that cannot start says why, and the next one starts")


def saving(page: Page) -> None:
    """Save a file with a mode, an owner, a link and line endings of its own; and one that is not text."""
    good = RULES.read_text()
    target = Path("/etc/cnprocd/kept-elsewhere.yaml")
    RULES.rename(target)
    target.write_bytes(good.replace("\n", "\r\n").encode())
    target.chmod(0o640)
    os.chown(target, 0, ORACLE)
    RULES.symlink_to(target.name)
    browser = page.open("/edit")
    browser.see("is a symbolic link", ".alert")
    browser.see("No mistakes", ".alert")
    typed(browser, "# edited\n")
    save(browser)
    found = target.stat()
    assert RULES.is_symlink()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 0, ORACLE), found
    assert target.read_bytes() == (good + "# edited\n").replace("\n", "\r\n").encode()
    see("saved: the link, mode 0640, the group and CR LF are as before")
    for bytes_, reason in ((b"# caf\xe9\n", "is not UTF-8"), (b"# mixed\r\n", "different ways")):
        damaged = good.encode() + bytes_
        target.write_bytes(damaged)
        page.open("/edit")
        browser.see(reason, ".alert")
        browser.see("No mistakes" if b"\r" in bytes_ else "mistake", ".alert")
        browser.find("textarea").send_keys("x")
        assert not browser.find("button", "Save and load").is_enabled()
        assert target.read_bytes() == damaged
    see("a file that is not UTF-8, or mixes line endings, is shown read-only with the reason")
    RULES.unlink()
    target.rename(RULES)
    RULES.write_text(good)
    RULES.chmod(0o644)
    os.chown(RULES, 0, 0)


def number_kept(browser: Browser) -> int:
    """Return how many matches the page keeps, by its note."""
    found = re.search(r"of ([0-9,]+) matches", browser.text("main p.muted"))
    return int(found[1].replace(",", "")) if found else 0


def clocks(page: Page) -> None:
    """Matches with times ahead, a browser whose clock is behind, and older matches beside new ones."""
    page.daemon.stop()
    now_s = time.time()
    write_matches(Path("/var/lib/cnprocd"), 20_000, [now_s - one for one in range(5)], "ora_unit", HOSTILE_UNIT)
    write_matches(
        Path("/var/lib/cnprocd"), 30_000, [now_s + AHEAD_S + one for one in range(400)], "ora_ahead", "ahead.service"
    )
    page.daemon.start()
    browser = page.browser
    source = f"const now = Date.now; Date.now = () => now() - {BEHIND_MS}"
    added = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page.open()
        browser.see("ora_ahead", "tbody")
        pid = fail("ora_now", 6)
        browser.see(f"ora_now[{pid}]", "tbody tr:first-child")
        browser.click(".toolbar select option", "1 h")
        browser.see("oracle-failed", ".legend")
        see("matches of an hour ahead, and a browser that is 20 min behind: new ones on top and in the chart")
        browser.click(".toolbar select option", "unit")
        browser.see("\\u202egpj\\u00ad", ".legend")
        label = browser.find("svg.chart").get_attribute("aria-label") or ""
        assert "\\u202egpj\\u00ad" in label and "\u202e" not in label, label
        see("the name of a hostile unit, in the chart and for a screen reader")
        while number_kept(browser) < 2500:
            note = browser.text("main p.muted")
            browser.click("button", "Older matches")
            browser.changed("main p.muted", note)
        kept = number_kept(browser)
        pid = fail("ora_later", 6)
        browser.see(f"ora_later[{pid}]", "tbody tr:first-child")
        assert number_kept(browser) == kept + 1, (kept, number_kept(browser))
        see(f"{kept:,} matches loaded, none of them dropped by the next one")
        browser.click(".toolbar select option", "rule")
        browser.click(".toolbar select option", "3 h")
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def many_rules(page: Page) -> None:
    """Thousands of rules: the list has an end, and a check that is out of date is cancelled."""
    lines = [
        f"  - {{name: many-{n}, events: [nonzero_exit], match: {{comm: many{n}, exit_code: {n % 100 + 1}}}}}"
        for n in range(MANY)
    ]
    DROPIN.parent.mkdir(exist_ok=True)
    DROPIN.write_text("rules:\n" + "\n".join(lines) + "\n")
    try:
        browser = page.open("/rules")
        browser.click("button", "Reload")
        browser.see(f"The first 300 of {MANY + 2:,} rules")
        rows = browser.script("return document.querySelectorAll('main tbody tr').length")
        assert rows == 300, rows
        browser.type("input[type=search]", "many-2999")
        browser.see("many-2999", "tbody tr:first-child")
        browser.go(f"/edit?file={DROPIN}")
        browser.see("No mistakes", ".alert")
        began_s = time.monotonic()
        for n in range(4):
            typed(browser, f"# {n}\n")
            browser.wait_for("a check", checks)
        assert len(checks()) <= 2, checks()
        browser.find("[aria-busy=false] .alert", "No mistakes")
        took_s = time.monotonic() - began_s
        see(f"{MANY:,} rules: 300 rows and a filter; 4 changes and their last check in {took_s:.1f} s")
        browser.click("button", "Undo all changes")
        browser.click("dialog button", "Discard")
    finally:
        DROPIN.unlink()
    browser.go("/rules")
    browser.click("button", "Reload")
    browser.see("2 rules are in force", ".alert")


def checks() -> list[str]:
    """Return the command lines of all processes that check rules."""
    return [line for line in command_lines() if "cnprocctl" in line and " check " in line]


def addresses(page: Page) -> None:
    """Addresses that lead nowhere, and questions without an answer."""
    browser = page.open("/jobs/abc")
    browser.see("There is no such job")
    for at in ("/rules/%E0%A4%A", "/nothing", "/constructor"):
        browser.go(at)
        browser.see("There is no such view")
    browser.go("/jobs/99999")
    browser.see("99999", ".alert")
    browser.go("/jobs")
    browser.see("Jobs", "h2")
    browser.see_not("99999", ".alert")
    browser.go("/match/")
    browser.see("This match is not kept")
    browser.go("/edit?file=/etc/passwd")
    browser.see("the daemon does not read /etc/passwd", ".alert")
    assert "root:" not in str(browser.script("return document.querySelector('textarea').value"))
    see("addresses of no job, no view, no match and no rule file: a clear state each")
    page.hook("#!/bin/sh\nexec sleep 600\n")
    kill(waiting("ora_pmon_ASK"))
    browser.go("/jobs")
    button = browser.find("tbody button[aria-label^=Kill]")
    number = button.get_attribute("data-key")
    button.send_keys(Keys.ENTER)
    browser.see("get SIGTERM", "dialog")
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    browser.see_not("get SIGTERM")
    assert browser.script("return document.activeElement.dataset.key") == number
    see("a question by keyboard: after Escape the focus is where it was")
    browser.click("tbody button", "Kill")
    browser.see("get SIGTERM", "dialog")
    browser.go("/rules")
    browser.see_not("get SIGTERM")
    browser.go("/jobs")
    browser.click("tbody button", "Kill")
    browser.see("get SIGTERM", "dialog")
    page.daemon.stop()
    browser.see("cnprocd is not running")
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "dialog")
    page.daemon.start()
    browser.see("Jobs", "h2")
    see("an open question is closed when its view is left, and when the daemon stops")
    page.hook(None)


def hostile_everywhere(page: Page) -> None:
    """A hostile name in each view: of matches, of one match, of its job, of trials, of the busiest, of a recording."""
    browser = page.open("/record")
    browser.click("button", "Start")
    browser.click("section[aria-label=Recording] button", "Record")
    browser.see("s left")
    pid = waiting(HOSTILE_COMM)
    kill(pid)
    browser.see(SHOWN_COMM, "section[aria-label='Busiest programs'] tbody")
    as_text(browser)
    browser.click("section[aria-label=Recording] button", "Stop")
    browser.click("button", "Replay against the rule files")
    browser.see(f"{SHOWN_COMM}[{pid}]", "section[aria-label=Recording] tbody")
    as_text(browser)
    browser.click("button", "Delete the recording")
    browser.go("/")
    browser.see(f"{SHOWN_COMM}[{pid}]", "tbody")
    as_text(browser)
    browser.click("tbody tr td a", ":")
    browser.see(f"{SHOWN_COMM}[{pid}]", "dd")
    browser.see("fires", ".badge")
    as_text(browser)
    match = str(browser.script("return location.hash")).removeprefix("#")
    browser.click("section[aria-label=Job] a", "Job")
    browser.see(f"{SHOWN_COMM}[{pid}]", "section[aria-label=Events]")
    browser.see(f"freeing what {SHOWN_COMM} held", "pre")
    as_text(browser)
    browser.go(match)
    browser.click("button", "Try edited rules on it")
    browser.see("The match that you chose")
    browser.see(SHOWN_COMM, "tbody")
    as_text(browser)
    see(f"{SHOWN_COMM!r} as text in six views")


def as_text(browser: Browser) -> None:
    """Assert that no element and no direction came of a hostile name, in texts and in labels."""
    found = browser.script(
        "return [document.querySelectorAll('main b').length, document.body.innerText +"
        " [...document.querySelectorAll('*')].flatMap(one => [...one.attributes].map(each => each.value)).join(' ')]"
    )
    assert isinstance(found, list) and found[0] == 0, "an element came of a name"
    assert "\u202e" not in str(found[1]), "a direction came of a name"


STEPS = (hostile_everywhere, recordings, saving, clocks, many_rules, addresses)
