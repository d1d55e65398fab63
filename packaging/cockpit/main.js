// The page: which view is shown, whether cnprocd answers, and what the viewer may change.

import { access, call, followAccess, run } from "./daemon.js";
import { alert, badge, button, closeDialogs, empty, failure, fill, h, onChange } from "./dom.js";
import { jobsView } from "./jobs.js";
import { matchView } from "./match.js";
import { connect } from "./matches.js";
import { nowView } from "./now.js";
import { recordView } from "./record.js";
import { editView } from "./edit.js";
import { rulesView } from "./rules.js";

const cockpit = window.cockpit;
const POLL_MS = 2000;
// A view draws into `main`. It returns {poll, stop}: poll(status) is called at once and about every two seconds while cnprocd
// answers, and may fail; stop() when another view is shown. `offline`: the view is useful without the daemon.
const VIEWS = {
    "": { of: nowView, name: "now" }, match: { of: matchView, name: "now" }, rules: { of: rulesView, name: "rules" },
    edit: { of: editView, name: "rules", offline: true }, jobs: { of: jobsView, name: "jobs" },
    record: { of: recordView, name: "record", offline: true },
};
const NO_VIEW = { of: main => { fill(main, empty("There is no such view", "Choose one of those above.")); return {} }, name: "", offline: true };
const main = document.getElementById("view");
const banner = document.getElementById("banner");
let shown = null;     // {key, view}
let status = null;    // of the daemon
let problem = null;   // why it does not answer
let timer = 0, failures = 0, missing = false;
const drawBanner = onChange(({ message, hint }) => fill(banner, message && alert("warn", message, hint)));

// What the address asks for. An address that is none (`#/%E0`) has no view either.
function place() {
    try {
        const { path: [first = "", ...rest], options } = cockpit.location;
        return { first, rest, options, ...Object.hasOwn(VIEWS, first) ? VIEWS[first] : NO_VIEW };
    } catch {
        return { first: "?", rest: [], options: {}, ...NO_VIEW };
    }
}

function show() {
    const { first, rest, options, of, name, offline } = place();
    for (const link of document.querySelectorAll("nav a")) {
        if (link.dataset.view === name) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
    }
    if (!status && !problem) return;  // not known yet
    const needsDaemon = problem && !offline;
    const key = JSON.stringify([first, rest, options, needsDaemon ? problem.kind : "", access.admin]);
    if (shown?.key === key) return;
    const before = shown;
    shown?.view?.stop?.();
    shown = { key, view: null };
    closeDialogs();
    fill(main);
    if (needsDaemon) showProblem();
    else shown.view = of(main, { path: rest, options, status });
    if (before && before.key.split(",")[0] !== key.split(",")[0]) main.focus({ preventScroll: true });
}

function start() {
    fill(banner, alert("info", "Starting cnprocd ..."));
    run(["systemctl", "start", "cnprocd.service"], { admin: "require" }).done.then(({ error }) => {
        fill(banner, error && failure(error));
        poll();
    });
}

function showProblem() {
    const journal = button("Journal", () => cockpit.jump("/system/logs#/?prio=debug&_SYSTEMD_UNIT=cnprocd.service"));
    const [title, advice] = {
        "no-permission": ["You may not see this", "Turn on administrative access at the top of Cockpit. Or let an administrator add you " +
            "to the group cnprocd, and log in again: then you see everything, and change nothing."],
        "not-installed": ["cnprocd is not installed", "Install the package cnprocd on this machine."],
    }[problem.kind] ?? ["cnprocd is not running", "No events are read and no rules are evaluated. " + (access.admin
        ? "Start the service. If it does not start, its journal has the reason." : "To start it, turn on administrative access in Cockpit.")];
    const stopped = problem.kind === "not-running";
    fill(main, empty(title, advice, stopped && access.admin && button("Start cnprocd", start, { class: "primary" }), stopped && journal,
                     button("Try again", poll), problem.message !== title && h("p", { class: "muted" }, problem.message)));
}

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
        if (error.kind === "not-running" && (missing || failures++ % 5 === 0))
            missing = (await run(["cnprocctl", "--version"]).done).error?.kind === "not-installed";
        if (error.kind === "not-running" && missing)
            Object.assign(error, { kind: "not-installed", message: "cnprocd is not installed", hint: "Install the package cnprocd." });
        problem = error;
    }
    show();
    const polled = status && shown?.view?.poll?.(status);
    Promise.resolve(polled).then(() => place().offline ? problem : null, error => error).then(trouble =>
        drawBanner({ message: trouble?.message, hint: trouble?.hint, problem: problem?.message }));
    clearTimeout(timer);
    timer = setTimeout(poll, POLL_MS);
}

// Cockpit keeps the style that the viewer chose in the local storage, and sends changes as events.
function applyStyle(chosen) {
    const style = chosen ?? localStorage.getItem("shell:style") ?? "auto";
    const dark = style === "dark" || (style === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.classList.toggle("dark", dark);
}

applyStyle();
window.addEventListener("storage", event => event.key === "shell:style" && applyStyle());
window.addEventListener("cockpit-style", event => applyStyle(event.detail?.style));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyStyle());

cockpit.addEventListener("locationchanged", () => { show(); poll() });
document.addEventListener("visibilitychange", () => document.hidden || poll());
followAccess(() => {
    fill(document.getElementById("access"), !access.admin && badge(
        "info", "Read only", "To change rules and jobs, turn on administrative access in Cockpit"));
    poll();
});
connect(error => error || poll());
poll();
