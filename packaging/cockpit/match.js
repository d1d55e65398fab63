// One match: all that its record has, its job, and why the rule fired.

import { call, cnprocctl } from "./daemon.js";
import { badge, button, card, empty, facts, failure, fill, h, row, table, time } from "./dom.js";
import { jobParts } from "./jobs.js";
import { processOf, statusOf } from "./now.js";
import { matches } from "./matches.js";

const cockpit = window.cockpit;
const REASONS = ["Holds", "Key", "Wanted", "Is"];
const HEAD = new Set(["time_ns", "rule", "comm", "pid", "status", "job_id", "job_state", "job_reason", "held_by"]);

async function find(id = "") {
    const known = matches.list.find(one => one.match_id === id);
    if (known?.held_by) return known;  // the history does not have it
    return (await call("History", { match_id: id, limit: 1 })).matches[0] ?? known;
}

const shown = value => value === true ? "yes" : value === false ? "no"
    : typeof value === "object" ? JSON.stringify(value) : h("bdi", {}, value);

function record(match) {
    const known = Object.entries(match).filter(([name, value]) => !HEAD.has(name) && value != null);
    const unknown = Object.keys(match).filter(name => !HEAD.has(name) && match[name] == null);
    return [facts(known.map(([name, value]) => [name, shown(value)])),
            unknown.length > 0 && h("p", { class: "muted" }, `Unknown or absent: ${unknown.join(", ")}. ` +
                "A rule that names a field under record: lets the daemon find it out.")];
}

// Cockpit has pages of units and of the journal. A program is found by its entries in the journal.
function links(match) {
    const journal = (label, field, value) => value && button(label, () =>
        cockpit.jump(`/system/logs#/?prio=debug&${field}=${encodeURIComponent(value)}`));
    return h("div", { class: "toolbar" },
        match.unit && button(`Unit ${match.unit}`, () => cockpit.jump(`/system/services#/${encodeURIComponent(match.unit)}`)),
        journal("Journal of the unit", "_SYSTEMD_UNIT", match.unit), journal("Journal of the program", "_EXE", match.exe),
        journal("Journal of the PID", "_PID", match.pid),
        button("Try edited rules on it", () => cockpit.location.go(["edit"], { match: match.match_id })));
}

const noJob = match => h("p", { class: "muted" }, match.held_by
    ? `No job: ${match.held_by} held this match back.` : "No job: the rule runs no hook for this match.");

const LEVELS = { yes: "ok", no: "bad", unknown: "warn" };

async function why(box, match) {
    // Text of the record that is no field of an event; a description has numbers for the status.
    const { status, rule, time_ns, ...event } = match;
    try {
        const [found] = await cnprocctl(["explain", "--event", "-", rule], { input: JSON.stringify(event) });
        fill(box, h("p", {}, found.fires ? badge("ok", "fires") : badge("warn", "does not fire with the rule files as they are now")),
             table("Reasons", REASONS, found.reasons.map(one => row(REASONS, [
                 badge(LEVELS[one.verdict], one.verdict), "\u00a0\u00a0".repeat(one.depth) + one.key, one.wanted || "-",
                 h("bdi", {}, one.actual || "-")]))));
    } catch (error) { fill(box, failure(error)) }
}

export function matchView(main, { path }) {
    let stopped = false, job = null;
    fill(main, h("p", { class: "empty" }, "Loading ..."));
    const back = h("p", {}, h("a", { href: "#/" }, "\u2190 Now"));
    find(path[0]).then(match => {
        if (stopped) return;
        if (!match) return fill(main, back, empty("This match is not kept",
            "The history keeps a number of matches and forgets the oldest. Matches that a throttle held back are in the journal only."));
        const whyBox = h("div", {}, "Loading ...");
        job = match.job_id == null ? null : jobParts(match.job_id);
        fill(main, back, card("Match", facts([
            ["Rule", h("a", { href: `#/rules/${encodeURIComponent(match.rule)}` }, h("bdi", {}, match.rule))], ["Process", processOf(match)],
            ["Status", statusOf(match)], ["Time", time(match.time_ns)], ["Held by", match.held_by]]), links(match)),
             card("Job", job ? [job.head, job.output] : noJob(match)), card("Why it fired", whyBox), card("Record", record(match)));
        job?.load().catch(() => null);  // the next poll reports it
        why(whyBox, match);
    }, error => fill(main, back, failure(error)));
    return { poll: () => job?.load(), stop: () => { stopped = true } };
}
