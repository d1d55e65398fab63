// Now: the health of the daemon, matches per minute, and matches as they happen.

import { call } from "./daemon.js";
import { chart } from "./chart.js";
import { announce, badge, button, card, count, duration, failure, fill, h, row, table, time } from "./dom.js";
import { follow, matches, older } from "./matches.js";

const MOST_ROWS = 300;  // in the document; more would be slow to draw and are not read
const CHART_EVERY_MS = 10000, HOURS = [1, 3, 12, 24];
const HEADS = ["Time", "Rule", "Process", "Status", "User", "Unit", "Job"];
const remembered = { filter: "", by: "rule", hours: 3 };
let ahead_s = 0;  // the clock of the machine, compared with the browser's

const tile = (name, level, value, detail) => h("div", { class: "tile" }, h("dt", {}, name),
    h("dd", {}, badge(level, value)), detail && h("dd", { class: "muted" }, detail));

function reloadTile(reload) {
    if (!reload.ok) return tile("Rules", "bad", "last reload failed", [time(reload.time_ns), ": ", reload.error]);
    if (reload.changed_files?.length) return tile("Rules", "warn", "files changed", "not loaded: " + reload.changed_files.join(", "));
    return null;
}

function tiles(status) {
    const { lost, jobs, events, stalls, reload, rules } = status;
    const enabled = rules.filter(one => one.enabled).length;
    const unknown = events.identity_unknown.reduce((sum, one) => sum + one.count, 0);
    const stalled = stalls.worst_last_minute_s ?? 0;
    return h("dl", { class: "tiles" },
        tile("cnprocd", "ok", "watching", ["for ", duration(Math.floor(status.uptime_s)), `, version ${status.version}, PID ${status.pid}`]),
        reloadTile(reload) ?? tile("Rules", enabled ? "ok" : "warn",
            `${enabled} in force` + (enabled < rules.length ? `, ${rules.length - enabled} disabled` : ""),
            ["loaded ", time(reload.loaded_ns), h("span", { title: `hash ${status.rules_hash}` }, `, hash ${status.rules_hash.slice(0, 8)}`)]),
        tile("Events lost", lost.total ? "warn" : "ok", lost.total.toLocaleString(),
             lost.total ? `${count(lost.overruns, "overrun")}, ${events.recovered} recovered` : "none since the start"),
        tile("Identity unknown", unknown ? "warn" : "ok", unknown.toLocaleString(),
             unknown ? events.identity_unknown.map(one => `${one.attribute}: ${one.reason} (${one.count})`).join("; ")
                     : "no match failed for it"),
        tile("Longest stall", stalled > 1 ? "warn" : "ok", duration(stalled),
             `last minute; ${duration(stalls.worst_s)} since the start` + (stalls.worst_cause ? ` (${stalls.worst_cause})` : "")),
        tile("Jobs", !jobs.durable || jobs.runner_silent ? "bad" : jobs.dead ? "warn" : "ok",
             !jobs.durable ? "not durable" : jobs.runner_silent ? "runner does not answer" : jobs.dead ? `${jobs.dead} dead` : "durable",
             h("a", { href: "#/jobs" }, jobs.why_not_durable ??
               `${jobs.waiting} waiting, ${jobs.running} running, ${jobs.dead} dead, ${jobs.done} done`)));
}

export const processOf = match => h("bdi", {}, `${match.comm ?? "unknown"}[${match.pid ?? "unknown"}]`);
export const statusOf = match => match.status ?? match.kind;
const textOf = match => [match.rule, `${match.comm}[${match.pid}]`, statusOf(match), match.user, match.unit].join(" ").toLowerCase();
const JOB_LEVELS = { waiting: "info", running: "info", done: "ok", dead: "bad" };

export function jobBadge(state, text) {
    return badge(JOB_LEVELS[state] ?? "info", text ?? state);
}

function matchRow(match) {
    const job = match.job_id ? h("a", { href: `#/jobs/${match.job_id}` },
        match.job_state ? jobBadge(match.job_state, `${match.job_id} ${match.job_state}`) : `job ${match.job_id}`) : "-";
    return row(HEADS, [
        match.match_id ? h("a", { href: `#/match/${match.match_id}`, "data-key": match.match_id }, time(match.time_ns)) : time(match.time_ns),
        [h("bdi", {}, match.rule), match.held_by && badge("info", `held by ${match.held_by}`), match.recovered && badge("warn", "recovered")],
        processOf(match), statusOf(match), h("bdi", {}, match.user ?? "unknown"),
        match.unit ? h("bdi", {}, match.unit) : h("span", { class: "muted" }, "unknown"), job,
    ]);
}

function live(box) {
    let paused = false, missed = 0;
    const note = h("p", { class: "muted", role: "status" });
    const body = h("tbody");
    const pause = button("Pause", () => {
        paused = !paused;
        missed = 0;
        if (!paused) redraw();
        drawNote();
    }, { "aria-pressed": "false" });
    const filter = h("input", {
        type: "search", placeholder: "rule, process, user, unit ...", "aria-label": "Filter matches", value: remembered.filter,
        oninput: () => { remembered.filter = filter.value; redraw() },
    });
    const more = button("Older matches", () => {
        more.disabled = true;
        older().catch(error => fill(note, failure(error))).finally(() => { more.disabled = false });
    });
    const fitting = list => {
        const words = remembered.filter.toLowerCase().split(/\s+/).filter(Boolean);
        return words.length ? list.filter(match => words.every(word => textOf(match).includes(word))) : list;
    };
    function drawNote() {
        pause.setAttribute("aria-pressed", String(paused));
        pause.textContent = paused ? `Resume (${missed} new)` : "Pause";
        const fits = fitting(matches.list).length;
        const cap = fits > MOST_ROWS ? `The newest ${MOST_ROWS} of ${count(fits, "match", "matches")} are shown; filter to see others. ` : "";
        const all = remembered.filter ? `${fits} of ${count(matches.list.length, "loaded match", "loaded matches")} fit. ` : "";
        const skipped = matches.skipped ? `${matches.skipped} were skipped by the stream and read from the history. ` : "";
        fill(note, all, cap, skipped);
        more.hidden = matches.complete;
    }
    function redraw() {
        const found = fitting(matches.list);
        fill(body, found.slice(0, MOST_ROWS).map(matchRow));
        if (!found.length) body.append(h("tr", {}, h("td", { colspan: HEADS.length, class: "empty" }, remembered.filter
            ? "No loaded match fits the filter."
            : "No matches yet. A process that dies as a rule describes appears here at once. Try: sh -c 'kill -9 $$'")));
        drawNote();
    }

    const stop = follow(fresh => {
        if (paused) {
            missed += fresh?.length ?? 0;
            return drawNote();
        }
        if (!fresh || fresh.length > MOST_ROWS || body.querySelector("td.empty")) return redraw();
        const rows = fitting(fresh).map(matchRow);
        rows.forEach(one => one.classList.add("fresh"));
        body.prepend(...rows);
        while (body.rows.length > MOST_ROWS) body.lastChild.remove();
        if (rows.length) announce(`${count(rows.length, "new match", "new matches")}: ${fresh[0].rule}, ${fresh[0].comm}`);
        drawNote();
    });
    const wrapper = table("Matches", HEADS, []);
    wrapper.querySelector("tbody").replaceWith(body);
    fill(box, card("Matches", h("div", { class: "toolbar" }, filter, pause), note, wrapper, more));
    redraw();
    return stop;
}

function charts(box) {
    const plot = h("div", { class: "muted" }, "Loading ...");
    const choice = (label, name, values, text) => h("label", {}, label + " ", h("select", {
        onchange: event => { remembered[name] = event.target.value; draw() },
    }, values.map(value => h("option", { value, selected: String(value) === String(remembered[name]) }, text(value)))));
    async function draw() {
        const per_s = remembered.hours > 3 ? 300 : 60;
        const to_s = Math.ceil((Date.now() / 1000 + ahead_s) / per_s) * per_s;
        const from_s = to_s - remembered.hours * 3600;
        try {
            const { counts } = await call("Counts", { by: remembered.by, since_ns: from_s * 1e9, per_s });
            fill(plot, counts.length ? chart(`Matches per ${per_s / 60} min`, counts, from_s, to_s, per_s)
                                     : h("p", { class: "empty" }, "No matches in this time."));
        } catch (error) { fill(plot, failure(error)) }
    }
    fill(box, card("Matches over time", h("div", { class: "toolbar" },
        choice("By", "by", ["rule", "unit", "kind"], value => value === "kind" ? "kind of event (deaths)" : value),
        choice("Last", "hours", HOURS, value => `${value} h`)), plot));
    draw();
    const timer = setInterval(draw, CHART_EVERY_MS);
    return () => clearInterval(timer);
}

export function nowView(main, { status }) {
    const health = h("div"), history = h("div"), stream = h("div");
    fill(main, health, history, stream);
    const draw = now => {
        ahead_s = now.started_ns / 1e9 + now.uptime_s - Date.now() / 1000;
        const next = card("Health", tiles(now));
        if (next.textContent !== health.textContent) fill(health, next);
    };
    draw(status);
    const stops = [charts(history), live(stream)];
    return { poll: draw, stop: () => stops.forEach(stop => stop()) };
}
