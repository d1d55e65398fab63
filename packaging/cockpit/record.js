// Record: the busiest programs live, and a recording of all events that rules can be tried on.

import { access, cnprocctl, follow } from "./daemon.js";
import { announce, button, card, count, empty, facts, failure, fill, h, row, table } from "./dom.js";
import { draft, draftInput, draftOption, isEdited } from "./edit.js";
import { rulesOption } from "./rules.js";

const KEYS = ["comm", "unit", "user"];
const COUNTS = [["fork", "Forks"], ["exec", "Execs"], ["exit", "Exits"], ["failed", "Failed"], ["signal", "Killed"]];
const DURATIONS = [["10s", 10, "10 seconds"], ["60s", 60, "1 minute"], ["300s", 300, "5 minutes"]];
const MATCHES = ["Second", "Rule", "Process", "Status"];
const MOST_MATCHES = 200;
// The recording. Its process holds it in a file without a name: it is gone when the process or the page ends.
const kept = { process: null, file: null, figures: null, onChange: null };
const isRecording = () => kept.process && !kept.figures;

export function recordView(main, { status }) {
    if (!access.admin) {
        fill(main, empty("Administrative access needed", "To see and record the events of all processes, turn on administrative access in Cockpit."));
        return {};
    }
    const stops = [];
    fill(main, top(stops), recorder(stops, status));
    return { stop: () => stops.forEach(stop => stop()) };
}

function top(stops) {
    let process = null;
    const body = h("div", {}, h("p", { class: "muted" }, "Start reads every event of every process, with a socket of its own. It costs some CPU time."));
    const by = h("select", { onchange: () => process && begin() }, KEYS.map(value => h("option", { value }, value)));
    const toggle = button("Start", () => process ? end() : begin(), { class: "primary" });
    function end() {
        process?.end();
        process = null;
        toggle.textContent = "Start";
    }
    function begin() {
        end();
        toggle.textContent = "Stop";
        fill(body, h("p", { class: "muted" }, "Counting for two seconds ..."));
        const mine = process = follow(["--until-eof", "top", "--by", by.value, "-n", "30"], one => mine === process && draw(one));
        mine.done.then(error => {
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

function forget() {
    kept.process?.end();
    Object.assign(kept, { process: null, file: null, figures: null });
}

// Start a recording. `kept.onChange` gets an error, or null: it has begun, or ended and is kept.
function begin(length) {
    forget();
    const mine = kept.process = follow(["record", "--hold", "--for", length], one => {
        if (mine !== kept.process) return;
        if (one.recording) kept.file = one.recording;
        else kept.figures = one;
        kept.onChange(null);
    });
    mine.done.then(error => {
        if (mine !== kept.process) return;
        forget();
        kept.onChange(error ?? { message: "The recording is gone", hint: "cnprocctl has ended." });
    });
}

function recorder(stops, status) {
    let left_s = 0;
    const note = h("div"), matched = h("div"), against = h("div", { class: "toolbar" });
    const length = h("select", {}, DURATIONS.map(([value, , label]) => h("option", { value, selected: value === "60s" }, label)));
    const start = button("Record", () => {
        if (isRecording()) return kept.process.write("\n");
        left_s = DURATIONS.find(([value]) => value === length.value)[1];
        fill(matched);
        begin(length.value);
        draw();
    }, { class: "primary" });
    const remove = button("Delete the recording", () => { forget(); fill(matched); draw(); start.focus() });
    function draw(error = null) {
        const { figures } = kept;
        start.textContent = isRecording() ? "Stop" : "Record";
        remove.hidden = !figures;
        fill(against, figures && [
            button("Replay against the rule files", () => replay(false), { "data-key": "replay" }),
            button(isEdited() ? `Replay against the edited ${draft.file.split("/").at(-1)}` : "Replay against edited rules", () => replay(true),
                   { disabled: !isEdited(), title: isEdited() ? "" : "Edit a file under Rules first; it need not be saved" })]);
        if (error) fill(note, failure(error));
        else if (isRecording()) fill(note, h("p", {}, kept.file ? `Recording; ${left_s || 1} s left.` : "Starting ..."));
        else fill(note, figures ? facts([["Events", figures.events], ["Exit records", figures.exit_records], ["Lost", figures.lost],
            ["Size", `${Math.ceil(figures.bytes / 1024).toLocaleString()} KiB`], ["Ended by", figures.ended.replace(/.*standard input/, "Stop")]])
            : h("p", { class: "muted" }, "A recording holds every event of every process, with names and arguments. Only root can " +
                "read it. It has no name and is gone when you delete it, close or reload the page, or log out."));
        if (figures && !error) announce(`Recorded ${figures.events} events`);
    }

    const timer = setInterval(() => { if (isRecording() && kept.file) { left_s--; draw() } }, 1000);
    async function replay(edited) {
        fill(matched, h("p", { class: "muted" }, "Evaluating the recording ..."));
        try {
            const args = [...rulesOption(status), "replay", "-n", String(MOST_MATCHES), ...(edited ? draftOption() : []), kept.file];
            const { matches, summary } = await cnprocctl(args, { admin: "require", input: edited ? draftInput() : "" });
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
    stops.push(() => {
        clearInterval(timer);
        if (isRecording() && kept.file) kept.process.write("\n");
        else if (isRecording()) forget();
    });
    kept.onChange = draw;
    draw();
    return card("Recording", h("div", { class: "toolbar" }, h("label", {}, "Length ", length), start, remove), note, against, matched);
}
