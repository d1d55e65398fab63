// Jobs: waiting, running, dead and done ones; retry, drop, kill; one job with its events and its output.

import { access, call } from "./daemon.js";
import { announce, ask, button, card, duration, empty, facts, failure, fill, h, onChange, row, table, time } from "./dom.js";
import { jobBadge } from "./now.js";

const LIMIT = 200, STATES = ["", "waiting", "running", "dead", "done"];
const HEADS = ["Job", "State", "Rule", "Created", "Attempts", "Outcome", "Actions"];
const remembered = { state: "", rule: "" };

const outcome = job => job.reason ?? (job.state === "done" ? `succeeded in ${duration(job.duration_ms / 1000)}`
    : job.state === "waiting" ? ["next attempt ", time(job.due_ns)] : "-");

const back = () => h("p", {}, h("a", { href: "#/jobs" }, "\u2190 Jobs"));

// What may be done with a job of a state: the method of the daemon, what it did, and what it does if it must be confirmed.
const ACTIONS = {
    dead: { method: "Retry", did: "waits again" },
    waiting: { method: "Drop", did: "is dropped", detail: "It will not run. It is then dead; Retry lets it wait again." },
    running: { method: "Kill", did: "is ended",
               detail: "The hook and all that it started get SIGTERM, and SIGKILL after 5 seconds. The job is then dead." },
};

// The button of a job. `after` is called when something was changed, with an error if it failed.
function action({ job_id, state }, after) {
    if (!access.admin || !ACTIONS[state]) return "-";
    const { method, did, detail } = ACTIONS[state];
    const act = async () => {
        if (!detail || await ask(`${method} job ${job_id}?`, detail, `${method} it`))
            await call(method, { job_id }).then(() => { announce(`Job ${job_id} ${did}`); after(null) }, after);
    };
    let acting = null;  // not disabled meanwhile: the button would lose the focus
    return button(method, () => { acting ??= act().finally(() => { acting = null }) }, { "data-key": `${method}-${job_id}`, "aria-label": `${method} job ${job_id}` });
}

export function jobsView(main, { path }) {
    if (!path.length) return allJobs(main);
    if (/^\d{1,15}$/.test(path[0])) return oneJob(main, Number(path[0]));
    fill(main, back(), empty("There is no such job", "A job has a number."));
    return {};
}

function allJobs(main) {
    const note = h("div"), list = h("div"), retryAll = h("span");
    const state = h("select", { "aria-label": "State", onchange: () => { remembered.state = state.value; load() } },
        STATES.map(value => h("option", { value, selected: value === remembered.state }, value || "all states")));
    const rule = h("input", { type: "search", placeholder: "rule, or a glob: ora*", "aria-label": "Rule", value: remembered.rule,
                              onchange: () => { remembered.rule = rule.value.trim(); load() } });
    fill(main, card("Jobs", h("div", { class: "toolbar" }, state, rule, retryAll), note, list));
    const after = async error => { await load().catch(() => null); fill(note, error && failure(error)) };  // until the list changes
    const draw = onChange(({ jobs }) => {
        fill(note);
        fill(list, jobs.length ? [
            table("Jobs", HEADS, jobs.map(job => row(HEADS, [
                h("a", { href: `#/jobs/${job.job_id}`, "data-key": `job-${job.job_id}` }, String(job.job_id)), jobBadge(job.state),
                h("bdi", {}, job.rule), time(job.created_ns), String(job.attempts), outcome(job), action(job, after),
            ]))),
            jobs.length === LIMIT && h("p", { class: "muted" }, `The newest ${LIMIT} jobs are shown.`),
        ] : empty("No jobs", remembered.state || remembered.rule ? "No job fits. Choose other states or rules."
                                                                 : "A match of a rule with run: becomes a job."));
    });
    function load() {
        const parameters = { state: remembered.state || null, rule: remembered.rule || null, limit: LIMIT };
        return call("Jobs", parameters).then(({ jobs }) => draw({ jobs, admin: access.admin }));
    }
    const drawRetryAll = onChange(dead => fill(retryAll, access.admin && dead > 0 && button(`Retry all ${dead} dead jobs`,
        () => call("RetryDead").then(() => after(null), after), { "data-key": "retry-all" })));
    return { poll: status => { drawRetryAll(status.jobs.dead); return load() } };
}

// What is known of a job, drawn by load(): for the job's own view and for that of its match.
export function jobParts(id) {
    const note = h("div"), head = h("div", {}, "Loading ..."), output = h("pre", { tabindex: "0", "aria-label": "Output" }), events = h("div");
    let isGone = false;
    const after = async error => { await load().catch(() => null); fill(note, error && failure(error)) };
    const drawJob = onChange(({ job }) => {
        fill(note);
        fill(head, h("div", { class: "toolbar" }, jobBadge(job.state), action(job, after)), facts([
            ["Job", h("a", { href: `#/jobs/${id}` }, `Job ${id}`)], ["Rule", h("bdi", {}, job.rule)], ["Outcome", outcome(job)],
            ["Attempts", `${job.attempts}` + (job.failures ? `, ${job.failures} failed` : "")],
            ["Created", time(job.created_ns)], ["Ended", job.finished_ns && time(job.finished_ns)], ["Exit code", job.exit_code],
            ["Signal", job.signal], ["Took", job.duration_ms != null && duration(job.duration_ms / 1000)],
            ["Latency", job.latency_ms != null && duration(job.latency_ms / 1000)], ["Hook PID", job.hook_pid],
        ]));
        fill(events, job.events.slice(0, 50).map(event => h("p", {},
            event.match_id ? h("a", { href: `#/match/${event.match_id}` }, "Match") : "Match", " of ",
            h("bdi", {}, `${event.comm ?? "unknown"}[${event.pid ?? "unknown"}]`), `: ${event.status ?? event.kind}`)),
             job.events.length > 50 && h("p", { class: "muted" }, `and ${job.events.length - 50} others`));
    });
    const drawOutput = onChange(found => fill(output, found.output || "The hook has written nothing."));
    async function load() {
        if (isGone) return;
        try {
            drawJob({ ...await call("Job", { job_id: id }), admin: access.admin });
            drawOutput(await call("Output", { job_id: id }));
        } catch (error) {
            if (error.kind !== "refused") throw error;
            isGone = true;
            fill(head, failure(error));
        }
    }
    return { head: [note, head], output, events, load };
}

function oneJob(main, id) {
    const job = jobParts(id);
    fill(main, back(), card(`Job ${id}`, job.head), card("Output of the last attempt", job.output), card("Events", job.events));
    return { poll: job.load };
}
