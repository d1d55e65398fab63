// The editor of rule files: check as one types, try on the past, save and load. Nothing is saved before `Save`.

import { access, cnprocctl } from "./daemon.js";
import { alert, ask, badge, button, card, count, empty, failure, fill, h, row, table, time } from "./dom.js";
import { problemList, reload, rulesOption } from "./rules.js";

const cockpit = window.cockpit;
const MAIN_FILE = "/etc/cnprocd/rules.yaml", OWN = "/etc/cnprocd/rules.d/";
const CHECK_MS = 400, PAST = 500, MOST_ROWS = 200;
const HEADS = ["Time", "Process", "Status", "Fired", "Would fire"];
// What is being edited; kept while other views are shown. Record replays against it.
export const draft = { file: null, text: null, saved: null, tag: null };
export const isEdited = () => draft.file !== null && draft.text !== draft.saved;
export const draftOption = () => isEdited() ? ["--draft", draft.file] : [];

window.addEventListener("beforeunload", event => isEdited() && event.preventDefault());

// Resolves to the rule files, the main one first.
async function files(status) {
    const found = new Set([status?.files[0] ?? MAIN_FILE, ...(status?.files ?? []), ...(status?.reload.changed_files ?? [])]);
    const { files: loadable, problems } = await cnprocctl([...rulesOption(status), "check"]);
    for (const file of [...loadable, ...problems.map(one => one.file)]) found.add(file);
    return [...found].filter(file => file.endsWith(".yaml"));
}

// A drop-in of a package or of /run is not edited in place: its copy in /etc takes precedence over it.
const ownCopy = file => /^\/(usr\/lib|run)\//.test(file) ? OWN + file.split("/").at(-1) : file;

export function editView(main, { options, status }) {
    let stopped = false, timer = 0, checked = 0;
    const note = h("div"), verdict = h("div", { role: "status" }), past = h("div");
    const choice = h("select", { "aria-label": "File", onchange: () => open(choice.value) });
    const lines = h("div", { class: "lines", "aria-hidden": "true" });
    const area = h("textarea", { spellcheck: "false", autocapitalize: "off", "aria-label": "Rule file", wrap: "off", readonly: !access.admin,
                                 oninput: typed, onscroll: () => { lines.scrollTop = area.scrollTop } });
    const save = button("Save and load", () => store(false), { class: "primary" });
    const trial = button("Try on past matches", tryOnPast);
    const back = button("Undo all changes", () => undo());
    const fresh = button("New file", newFile);
    fill(main, h("p", {}, h("a", { href: "#/rules" }, "\u2190 Rules")), card("Edit rules",
        h("div", { class: "toolbar" }, choice, fresh, save, trial, back), note,
        h("div", { class: "editor" }, lines, area), verdict, past));

    function drawLines(problems = []) {
        const worst = new Map();
        for (const one of problems) if (worst.get(one.line) !== "bad") worst.set(one.line, one.level);
        fill(lines, area.value.split("\n").map((_, i) => h("div", { class: worst.get(i + 1) }, String(i + 1))));
        lines.scrollTop = area.scrollTop;
    }

    function drawButtons(valid) {
        save.disabled = !access.admin || !isEdited() || !valid;
        save.title = !access.admin ? "Needs administrative access" : !isEdited() ? "Nothing was changed" : valid ? "" : "Correct the mistakes first";
        trial.disabled = !valid;
        back.disabled = !isEdited();
        back.hidden = fresh.hidden = !access.admin;
    }

    function typed() {
        draft.text = area.value;
        drawLines();
        drawButtons(false);
        clearTimeout(timer);
        timer = setTimeout(check, CHECK_MS);
    }

    function goTo(line) {
        const start = area.value.split("\n").slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
        area.focus();
        area.setSelectionRange(start, start + (area.value.slice(start).indexOf("\n") + 1 || area.value.length - start + 1) - 1);
        area.scrollTop = Math.max(0, (line - 6) * 20);
    }

    async function check() {
        const number = ++checked;
        try {
            const found = await cnprocctl([...rulesOption(status), "check", "--draft", draft.file], { input: area.value });
            if (stopped || number !== checked) return;
            const all = [...found.problems.map(one => ({ ...one, level: "bad" })), ...found.warnings.map(one => ({ ...one, level: "warn" }))];
            const here = all.filter(one => one.file === draft.file && one.line), elsewhere = all.filter(one => !here.includes(one));
            drawLines(here);
            drawButtons(found.problems.length === 0);
            fill(verdict, found.problems.length ? alert("bad", `${count(found.problems.length, "mistake")}: the daemon would reject this`)
                : alert("ok", `No mistakes: ${count(found.rules, "rule")} in all files` + (found.warnings.length ? `, ${count(found.warnings.length, "warning")}` : "")),
                 problemList(here, one => goTo(one.line)), problemList(elsewhere));
        } catch (error) {
            if (!stopped && number === checked) { fill(verdict, failure(error)); drawButtons(false) }
        }
    }

    const mayDiscard = () => ask("Discard the changes?", `${draft.file} was edited and not saved.`, "Discard");
    const undo = async () => { if (await mayDiscard()) { area.value = draft.saved; typed() } };

    async function open(file) {
        [note, past].forEach(box => fill(box));
        drawButtons(false);
        if (isEdited() && file !== draft.file && !await mayDiscard()) [file, options.line] = [draft.file, null];
        if (file !== draft.file || !isEdited()) {
            try {
                const read = await new Promise((resolve, reject) => cockpit.file(file, { superuser: "try" }).read()
                        .then((text, tag) => resolve({ text, tag }), reject));
                Object.assign(draft, { file: ownCopy(file), text: read.text ?? "", saved: read.text ?? "", tag: ownCopy(file) === file ? read.tag : null });
                if (draft.file !== file) fill(note, alert("info", `Saving makes ${draft.file}`, `It takes precedence over ${file}, which stays as it is.`));
            } catch (error) {
                fill(note, alert("bad", `Cannot read ${file}`, error.message));
                return;
            }
        }
        if (stopped) return;
        if (![...choice.options].some(one => one.value === draft.file)) choice.append(h("option", { value: draft.file }, draft.file));
        choice.value = draft.file;
        area.value = draft.text;
        drawLines();
        drawButtons(false);
        if (options.line) goTo(Number(options.line));
        check();
    }

    async function newFile() {
        const field = h("input", { value: "my-rules.yaml", "aria-label": "Name" });
        const name = await ask("New rule file", ["Its name in rules.d: ", field], "Create", field);
        if (!name) return;
        if (!/^[A-Za-z0-9][\w.-]*\.yaml$/.test(name))
            return fill(note, alert("bad", `Not a name of a rule file: ${name}`, "Use letters, digits and dashes, and end it in .yaml."));
        await open(OWN + name);
        if (!area.value) {
            area.value = "rules:\n  - name: my-rule\n    events: [nonzero_exit]\n    match:\n      comm: my-program\n";
            typed();
        }
    }

    // The tag names the content that was read: a file that another session changed meanwhile is not overwritten.
    async function store(anyway, isFormer) {
        save.disabled = true;
        const { text, saved, tag, file } = draft;
        try {
            if (file.startsWith(OWN)) await cockpit.spawn(["mkdir", "-p", OWN], { superuser: "require", err: "message" });
            draft.tag = await new Promise((resolve, reject) => cockpit.file(file, { superuser: "require" })
                    .replace(text || (isFormer ? "" : "\n"), anyway ? undefined : tag ?? "-").then(resolve, reject));
            draft.saved = text;
            fill(note, h("p", { class: "muted" }, `${file} is saved. Loading the rules ...`));
            const outcome = await reload();
            const refused = [outcome].flat()[0].classList.contains("bad");
            fill(note, outcome, refused && button("Put the former content back", () => {
                draft.text = saved;
                store(false, true);
            }));
        } catch (error) {
            fill(note, error.problem === "change-conflict"
                ? alert("bad", `${file} was changed by another program since it was opened`, "Copy your changes and open the file again, or overwrite it.",
                        button("Overwrite it", () => store(true), { class: "danger" }))
                : alert("bad", `Cannot save ${file}`, error.message));
        }
        if (!stopped && area.value !== draft.text) area.value = draft.text;
        check();
    }

    async function tryOnPast() {
        trial.disabled = true;
        fill(past, h("p", { class: "muted" }, "Evaluating past matches ..."));
        try {
            const found = await cnprocctl([...rulesOption(status), "replay", "--history", "-n", String(PAST), "--draft", draft.file], { input: area.value });
            if (!stopped) drawPast(found.events.reverse());
        } catch (error) { fill(past, failure(error)) }
        trial.disabled = false;
    }

    function drawPast(events) {
        const wanted = options.match && events.find(one => one.match_id === options.match);
        const differs = events.filter(one => String(one.fired) !== String(one.fires));
        const rows = (wanted ? [wanted] : differs.length ? differs : events).slice(0, MOST_ROWS);
        const names = one => [
            one.fires.map(name => badge(one.fired.includes(name) ? "ok" : "info", one.fired.includes(name) ? name : `${name} (new)`)),
            one.fired.filter(name => !one.fires.includes(name) && !one.unknown.includes(name)).map(name => badge("bad", `${name} (no longer)`)),
            one.unknown.map(name => badge("warn", `${name} (unknown)`, "The rule needs a field that was not recorded")),
        ];
        fill(past, h("h2", {}, "On past matches"), h("p", {}, wanted ? "The match that you chose:"
            : `${count(events.length, "event")} of the history; other rules would fire for ${differs.length}. ` +
              "The history has only events that some rule matched. To try rules on all events, record some under Record."),
             rows.length ? table("Past matches", HEADS, rows.map(one => row(HEADS, [
                 one.match_id ? h("a", { href: `#/match/${one.match_id}` }, time(one.time_ns)) : time(one.time_ns),
                 h("bdi", {}, `${one.comm ?? "unknown"}[${one.pid ?? "unknown"}]`), one.status, one.fired.join(", "), names(one)])))
                 : empty("No past matches", "The history is empty."));
    }

    files(status).then(async found => {
        const wanted = options.file ?? (isEdited() ? draft.file : found[0]);
        fill(choice, [...new Set([...found, wanted])].map(file => h("option", { value: file }, file)));
        await open(wanted);
        if (options.match) tryOnPast();
    }, error => fill(note, failure(error)));
    if (!access.admin) fill(note, alert("info", "Read only", "To change rules, turn on administrative access in Cockpit."));
    return { stop: () => { stopped = true; clearTimeout(timer) } };
}
