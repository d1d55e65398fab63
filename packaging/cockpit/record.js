// Record: the busiest programs live, and a recording of all events that rules can be tried on.

import { access, cnprocctl, run } from "./daemon.js";
import { announce, button, card, count, empty, facts, failure, fill, h, row, table } from "./dom.js";
import { draft, draftOption, isEdited } from "./edit.js";
import { rulesOption } from "./rules.js";

const KEYS = ["comm", "unit", "user"];
const COUNTS = [["fork", "Forks"], ["exec", "Execs"], ["exit", "Exits"], ["failed", "Failed"], ["signal", "Killed"]];
const DURATIONS = [["10s", 10, "10 seconds"], ["60s", 60, "1 minute"], ["300s", 300, "5 minutes"]];
const MATCHES = ["Second", "Rule", "Process", "Status"];
const MOST_MATCHES = 200;
const kept = { directory: null, figures: null };  // the recording, until the page is left

export function recordView(main, { status }) {
    if (!access.admin) {
        fill(main, empty("Administrative access needed", "To see and record the events of all processes, turn on administrative access in Cockpit."));
        return {};
    }
    const stops = [];
    fill(main, top(stops), recorder(stops, status));
    return { stop: () => stops.forEach(stop => stop()) };
}

// -- top

function top(stops) {
    let process = null;
    const body = h("div", {}, h("p", { class: "muted" }, "Start reads every event of every process, with a socket of its own. It costs some CPU time."));
    const by = h("select", { onchange: () => process && begin() }, KEYS.map(value => h("option", { value }, value)));
    const toggle = button("Start", () => process ? end() : begin(), { class: "primary" });
    function end() {
        process?.stop();
        process = null;
        toggle.textContent = "Start";
    }
    function begin() {
        end();
        toggle.textContent = "Stop";
        fill(body, h("p", { class: "muted" }, "Counting for two seconds ..."));
        const mine = process = run(["cnprocctl", "--json", "--until-eof", "top", "--by", by.value, "-n", "30"], {
            admin: "require", open: true,
            onOutput: text => {
                const lines = text.split("\n");
                if (lines.length > 1 && mine === process) draw(JSON.parse(lines.at(-2)));
                return lines.at(-1);
            },
        });
        mine.done.then(({ error }) => {
            if (mine !== process) return;
            end();
            if (error) fill(body, failure(error));
        });
    }
    function draw({ seconds, events, lost, top: ranked }) {
        const heads = [by.value, ...COUNTS.map(([, label]) => label)];
        fill(body, h("p", {}, `${Math.round(events / seconds).toLocaleString()} events a second, ${lost} lost, over ${seconds.toFixed(1)} s`),
             table("Busiest", heads, ranked.map(one => row(heads, [
                 h("bdi", {}, one[heads[0]]), ...COUNTS.map(([name]) => one[name] ? one[name].toLocaleString() : "-")]))));
    }
    stops.push(end);
    return card("Busiest programs", h("div", { class: "toolbar" }, h("label", {}, "By ", by), toggle), body);
}

// -- a recording

async function forget() {
    const { directory } = kept;
    kept.directory = kept.figures = null;
    if (directory) await run(["rm", "-r", "--", directory], { admin: "require" }).done;
}

window.addEventListener("pagehide", forget);

function recorder(stops, status) {
    let process = null, timer = 0;
    const note = h("div"), matched = h("div");
    const length = h("select", {}, DURATIONS.map(([value, , label]) => h("option", { value, selected: value === "60s" }, label)));
    const start = button("Record", () => process ? process.stop() : begin(), { class: "primary" });
    const remove = button("Delete the recording", async () => { await forget(); fill(matched); draw() });
    const against = h("div", { class: "toolbar" });

    function draw() {
        start.textContent = process ? "Stop" : "Record";
        start.disabled = false;
        remove.hidden = !kept.figures || process;
        fill(against, kept.figures && !process && [
            button("Replay against the rule files", () => replay(false)),
            button(isEdited() ? `Replay against the edited ${draft.file.split("/").at(-1)}` : "Replay against edited rules", () => replay(true),
                   { disabled: !isEdited(), title: isEdited() ? "" : "Edit a file under Rules first; it need not be saved" })]);
        if (kept.figures && !process) fill(note, facts([["Events", kept.figures.events], ["Exit records", kept.figures.exit_records], ["Lost", kept.figures.lost],
            ["Size", `${Math.ceil(kept.figures.bytes / 1024).toLocaleString()} KiB`], ["Ended by", kept.figures.ended.replace("a signal", "Stop")]]));
        else if (!process) fill(note, h("p", { class: "muted" }, "A recording holds every event of every process, with names and " +
            "arguments. Only root can read it; delete it before you leave the page."));
    }

    async function begin() {
        fill(matched);
        start.disabled = true;
        await forget();
        await run(["find", "/var/tmp", "-maxdepth", "1", "-name", "cnprocd-recording.*", "-user", "root", "-mmin", "+720",  // of lost sessions
                   "-exec", "rm", "-r", "--", "{}", "+"], { admin: "require" }).done;
        const { output, error } = await run(["mktemp", "-d", "/var/tmp/cnprocd-recording.XXXXXXXX"], { admin: "require" }).done;
        if (error) return fill(note, failure(error));
        kept.directory = output.trim();
        let left_s = DURATIONS.find(([value]) => value === length.value)[1], recording = false;
        fill(note, h("p", {}, "Starting ..."));
        process = run(["cnprocctl", "--json", "--until-eof", "record", "--for", length.value, `${kept.directory}/events`], {
            admin: "require", open: true, err: "out", onOutput: text => { recording = text.includes("recording"); return text },
        });
        timer = setInterval(() => recording && fill(note, h("p", {}, `Recording; ${left_s-- || 1} s left.`)), 1000);
        draw();
        const done = await process.done;
        clearInterval(timer);
        process = null;
        const found = done.output.indexOf("{");
        kept.figures = found < 0 ? null : JSON.parse(done.output.slice(found));
        const refused = kept.figures?.error;
        if (refused) kept.figures = null;
        draw();
        if (kept.figures) announce(`Recorded ${kept.figures.events} events`);
        else fill(note, failure(refused ? { message: refused.what, hint: refused.hint } : done.error));
    }

    async function replay(edited) {
        fill(matched, h("p", { class: "muted" }, "Evaluating the recording ..."));
        try {
            const args = [...rulesOption(status), "replay", "-n", String(MOST_MATCHES), ...(edited ? draftOption() : []), `${kept.directory}/events`];
            const { matches, summary } = await cnprocctl(args, { admin: "require", input: edited ? draft.text : "" });
            const first = matches.find(one => one.kernel_time_ns)?.kernel_time_ns ?? 0;
            fill(matched, h("h2", {}, edited ? `With the edited ${draft.file}` : "With the rule files"),
                 h("p", {}, `${count(summary.matches, "match", "matches")}, of which throttles would hold back ${summary.held_back}: `,
                   Object.entries(summary.rules).map(([rule, n]) => `${rule} ${n}`).join(", ") || "no rule fires"),
                 summary.matches > matches.length && h("p", { class: "muted" }, `The newest ${matches.length} are shown.`),
                 matches.length > 0 && table("Matches of the recording", MATCHES, matches.map(one => row(MATCHES, [
                     one.kernel_time_ns ? ((one.kernel_time_ns - first) / 1e9).toFixed(3) : "-", h("bdi", {}, one.rule),
                     h("bdi", {}, `${one.comm ?? "unknown"}[${one.pid}]`), one.status ?? one.kind]))));
        } catch (error) { fill(matched, failure(error)) }
    }
    stops.push(() => { process?.stop(); clearInterval(timer) });
    draw();
    return card("Recording", h("div", { class: "toolbar" }, h("label", {}, "Length ", length), start, remove), note, against, matched);
}
