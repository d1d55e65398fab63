// Jobs: waiting, running, dead and done ones; retry, drop, kill; one job with its events and its output.

import { access, call } from "./daemon.js";
import { announce, ask, button, card, duration, empty, facts, failure, fill, h, onChange, row, table, time } from "./dom.js";
import { jobBadge } from "./now.js";

const LIMIT = 200, STATES = ["", "waiting", "running", "dead", "done"];
const HEADS = ["Job", "State", "Rule", "Created", "Attempts", "Outcome", "Actions"];
const remembered = { state: "", rule: "" };

const outcome = job => job.reason ?? (job.state === "done" ? `succeeded in ${duration(job.duration_ms / 1000)}`
    : job.state === "waiting" ? ["next attempt ", time(job.due_ns)] : "-");

// The buttons of a job. `after` is called when something was changed, with an error if it failed.
function actions(job, after) {
    const change = (label, what, text) => button(label, async event => {
        event.target.disabled = true;
        try {
            if (await what()) announce(`Job ${job.job_id} ${text}`);
            after(null);
        } catch (error) { after(error) }
        event.target.disabled = false;
    }, { "data-key": `${label}-${job.job_id}`, "aria-label": `${label} job ${job.job_id}` });
    const sure = async (question, detail, yes, method) =>
        await ask(question, detail, yes) && call(method, { job_id: job.job_id });
    if (!access.admin) return "-";
    if (job.state === "dead") return change("Retry", () => call("Retry", { job_id: job.job_id }), "waits again");
    if (job.state === "waiting") return change("Drop", () => sure(`Drop job ${job.job_id}?`,
        "It will not run. It is then dead; Retry lets it wait again.", "Drop it", "Drop"), "is dropped");
    if (job.state === "running") return change("Kill", () => sure(`Kill the hook of job ${job.job_id}?`,
        "The hook and all that it started get SIGTERM, and SIGKILL after 5 seconds. The job is then dead.", "Kill it", "Kill"), "is ended");
    return "-";
}

export function jobsView(main, { path }) {
    return path.length ? oneJob(main, Number(path[0])) : allJobs(main);
}

function allJobs(main) {
    const note = h("div"), list = h("div"), retryAll = h("span");
    const state = h("select", { "aria-label": "State", onchange: () => { remembered.state = state.value; load() } },
        STATES.map(value => h("option", { value, selected: value === remembered.state }, value || "all states")));
    const rule = h("input", { type: "search", placeholder: "rule, or a glob: ora*", "aria-label": "Rule", value: remembered.rule,
                              onchange: () => { remembered.rule = rule.value.trim(); load() } });
    fill(main, card("Jobs", h("div", { class: "toolbar" }, state, rule, retryAll), note, list));
    const after = error => { fill(note, error && failure(error)); load() };
    const draw = onChange(({ jobs }) => {
        fill(list, jobs.length ? [
            table("Jobs", HEADS, jobs.map(job => row(HEADS, [
                h("a", { href: `#/jobs/${job.job_id}`, "data-key": `job-${job.job_id}` }, String(job.job_id)), jobBadge(job.state),
                h("bdi", {}, job.rule), time(job.created_ns), String(job.attempts), outcome(job), actions(job, after),
            ]))),
            jobs.length === LIMIT && h("p", { class: "muted" }, `The newest ${LIMIT} jobs are shown.`),
        ] : empty("No jobs", remembered.state || remembered.rule ? "No job fits. Choose other states or rules."
                                                                 : "A match of a rule with run: becomes a job."));
    });
    function load() {
        const parameters = { state: remembered.state || null, rule: remembered.rule || null, limit: LIMIT };
        call("Jobs", parameters).then(({ jobs }) => draw({ jobs, admin: access.admin }), error => fill(note, failure(error)));
    }
    const drawRetryAll = onChange(dead => fill(retryAll, access.admin && dead > 0 && button(`Retry all ${dead} dead jobs`,
        () => call("RetryDead").then(() => after(null), after), { "data-key": "retry-all" })));
    load();
    return { poll: status => { drawRetryAll(status.jobs.dead); load() } };
}

function oneJob(main, id) {
    const note = h("div"), head = h("div"), output = h("pre", { tabindex: "0", "aria-label": "Output" }), events = h("div");
    fill(main, h("p", {}, h("a", { href: "#/jobs" }, "\u2190 Jobs")), note,
         card(`Job ${id}`, head), card("Output of the last attempt", output), card("Events", events));
    const after = error => { fill(note, error && failure(error)); load() };
    const drawJob = onChange(({ job }) => {
        fill(head, h("div", { class: "toolbar" }, jobBadge(job.state), actions(job, after)), facts([
            ["Rule", h("bdi", {}, job.rule)], ["Outcome", outcome(job)], ["Attempts", `${job.attempts}` + (job.failures ? `, ${job.failures} failed` : "")],
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
        try {
            drawJob({ ...await call("Job", { job_id: id }), admin: access.admin });
            drawOutput(await call("Output", { job_id: id }));
        } catch (error) { fill(note, failure(error)) }
    }
    load();
    return { poll: load };
}
