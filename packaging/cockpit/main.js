// The page: which view is shown, whether cnprocd answers, and what the viewer may change.

import { access, call, followAccess, run } from "./daemon.js";
import { alert, badge, button, empty, failure, fill, h } from "./dom.js";
import { jobsView } from "./jobs.js";
import { matchView } from "./match.js";
import { connect } from "./matches.js";
import { nowView } from "./now.js";
import { recordView } from "./record.js";
import { editView } from "./edit.js";
import { rulesView } from "./rules.js";

const cockpit = window.cockpit;
const POLL_MS = 2000;
// A view draws into `main`. It returns {poll, stop}: poll(status) is called about every two seconds while cnprocd
// answers, stop() when another view is shown. `offline`: the view is useful without the daemon.
const VIEWS = {
    "": { of: nowView, name: "now" }, match: { of: matchView, name: "now" }, rules: { of: rulesView, name: "rules" },
    edit: { of: editView, name: "rules", offline: true }, jobs: { of: jobsView, name: "jobs" },
    record: { of: recordView, name: "record", offline: true },
};
const main = document.getElementById("view");
const banner = document.getElementById("banner");
let shown = null;     // {key, view}
let status = null;    // of the daemon
let problem = null;   // why it does not answer
let drawnProblem = null, timer = 0, failures = 0, missing = false;

function show() {
    const [first = "", ...rest] = cockpit.location.path;
    const { of, name, offline } = VIEWS[first] ?? VIEWS[""];
    for (const link of document.querySelectorAll("nav a")) {
        if (link.dataset.view === name) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
    }
    if (!status && !problem) return;  // not known yet
    const needsDaemon = problem && !offline;
    const key = JSON.stringify([first, rest, cockpit.location.options, needsDaemon ? problem.kind : "", access.admin]);
    if (shown?.key === key) return;
    const before = shown;
    shown?.view?.stop?.();
    shown = { key, view: null };
    fill(main);
    if (needsDaemon) showProblem();
    else shown.view = of(main, { path: rest, options: cockpit.location.options, status });
    if (before && before.key.split(",")[0] !== key.split(",")[0]) main.focus({ preventScroll: true });
}

// -- cnprocd does not answer

function start() {
    fill(banner, alert("info", "Starting cnprocd ..."));
    run(["systemctl", "start", "cnprocd.service"], { admin: "require" }).done.then(({ error }) => {
        fill(banner, error && failure(error));
        poll();
    });
}

function showProblem() {
    const journal = button("Journal", () => cockpit.jump("/system/logs#/?prio=debug&_SYSTEMD_UNIT=cnprocd.service"));
    const again = button("Try again", poll);
    const [title, advice] = {
        "no-permission": ["You may not see this", "Turn on administrative access at the top of Cockpit. Or let an administrator add you " +
            "to the group cnprocd, and log in again: then you see everything, and change nothing."],
        "not-installed": ["cnprocd is not installed", "Install the package cnprocd on this machine."],
    }[problem.kind] ?? ["cnprocd is not running", "No events are read and no rules are evaluated. " + (access.admin
        ? "Start the service. If it does not start, its journal has the reason." : "To start it, turn on administrative access in Cockpit.")];
    const stopped = problem.kind === "not-running";
    fill(main, empty(title, advice, stopped && access.admin && button("Start cnprocd", start, { class: "primary" }), stopped && journal,
                     again, problem.message !== title && h("p", { class: "muted" }, problem.message)));
}

async function isInstalled() {
    const { error } = await run(["cnprocctl", "--version"]).done;
    return error?.kind !== "not-installed";
}

// -- polls

async function poll() {
    clearTimeout(timer);
    try {
        if (!document.hidden || !status) {
            status = await call("Status");
            problem = null;
        }
    } catch (error) {
        status = null;
        // Again and again: a package manager stops the daemon some seconds before it removes the program.
        if (error.kind === "not-running" && (missing || failures++ % 5 === 0)) missing = !await isInstalled();
        if (error.kind === "not-running" && missing)
            Object.assign(error, { kind: "not-installed", message: "cnprocd is not installed", hint: "Install the package cnprocd." });
        problem = error;
    }
    if (problem?.kind !== drawnProblem) {
        drawnProblem = problem?.kind;
        fill(banner, problem && VIEWS[cockpit.location.path[0] ?? ""]?.offline && alert("warn", problem.message, problem.hint));
    }
    show();
    if (status) shown?.view?.poll?.(status);
    clearTimeout(timer);
    timer = setTimeout(poll, POLL_MS);
}

// -- the look: Cockpit keeps the choice of the viewer in the local storage, and sends changes as events

function applyStyle(chosen) {
    const style = chosen ?? localStorage.getItem("shell:style") ?? "auto";
    const dark = style === "dark" || (style === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.classList.toggle("dark", dark);
}

applyStyle();
window.addEventListener("storage", event => event.key === "shell:style" && applyStyle());
window.addEventListener("cockpit-style", event => applyStyle(event.detail?.style));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyStyle());

cockpit.addEventListener("locationchanged", show);
document.addEventListener("visibilitychange", () => document.hidden || poll());
followAccess(() => {
    fill(document.getElementById("access"), !access.admin && badge(
        "info", "Read only", "To change rules and jobs, turn on administrative access in Cockpit"));
    show();
});
connect(error => error || poll());
poll();
