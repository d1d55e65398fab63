// The editor of rule files: check as one types, try on the past, save and load. Nothing is saved before `Save`.

import { access, cnprocctl } from "./daemon.js";
import { alert, ask, badge, button, card, count, empty, failure, fill, h, onChange, row, table, time } from "./dom.js";
import { problemList, reload, rulesOption } from "./rules.js";

const cockpit = window.cockpit;
const MAIN_FILE = "/etc/cnprocd/rules.yaml", OWN = "/etc/cnprocd/rules.d/";
const CHANGED = 1;  // exit status of `rules write`: another content than the one of --hash
const CHECK_MS = 400, PAST = 500, MOST_ROWS = 200;
const HEADS = ["Time", "Process", "Status", "Fired", "Would fire"];
// What is being edited; kept while other views are shown. Record replays against it.
const NOTHING = { file: null, text: "", saved: "", newline: "\n", hash: null, readOnly: null };
export const draft = { ...NOTHING };
export const isEdited = () => draft.file !== null && draft.text !== draft.saved;
export const draftOption = () => draft.readOnly ? [] : ["--draft", draft.file];
export const draftInput = () => draft.readOnly ? "" : draft.text.replaceAll("\n", draft.newline);

window.addEventListener("beforeunload", event => isEdited() && event.preventDefault());

// A drop-in of a package or of /run is not edited in place: its copy in /etc takes precedence over it.
const ownCopy = file => /^\/(usr\/lib|run)\//.test(file) ? OWN + file.split("/").at(-1) : file;

export function editView(main, { options, status }) {
    let stopped = false, opened = 0, timer = 0, checking = new AbortController();
    const note = h("div"), verdict = h("div", { role: "status" }), past = h("div");
    const choice = h("select", { "aria-label": "File", onchange: () => open(choice.value) });
    const lines = h("div", { class: "lines", "aria-hidden": "true" });
    const area = h("textarea", { spellcheck: "false", autocapitalize: "off", "aria-label": "Rule file", wrap: "off", readonly: true,
                                 oninput: typed, onscroll: () => { lines.scrollTop = area.scrollTop } });
    const save = button("Save and load", () => store(false), { class: "primary" });
    const trial = button("Try on past matches", tryOnPast);
    const back = button("Undo all changes", () => undo());
    const fresh = button("New file", newFile);
    fill(main, h("p", {}, h("a", { href: "#/rules" }, "\u2190 Rules")), card("Edit rules",
        !access.admin && alert("info", "Read only", "To change rules, turn on administrative access in Cockpit."),
        h("div", { class: "toolbar" }, choice, fresh, save, trial, back), note,
        h("div", { class: "editor" }, lines, area), verdict, past));

    const drawNumbers = onChange(({ count: last, worst }) => {
        fill(lines, Array.from({ length: last }, (_, i) => h("div", { class: worst[i + 1] }, String(i + 1))));
        lines.scrollTop = area.scrollTop;
    });
    function drawLines(problems = []) {
        const worst = {};
        for (const one of problems) if (worst[one.line] !== "bad") worst[one.line] = one.level;
        drawNumbers({ count: area.value.split("\n").length, worst });
    }
    // Add the rule files that are not offered yet.
    function offer(files) {
        const known = new Set([...choice.options].map(one => one.value));
        for (const file of files) if (file?.endsWith(".yaml") && !known.has(file)) choice.append(h("option", { value: file }, file));
    }
    function drawButtons(valid, isBusy = false) {
        verdict.setAttribute("aria-busy", String(isBusy));  // what it shows is about an earlier text
        save.disabled = !access.admin || !isEdited() || !valid;
        save.title = !access.admin ? "Needs administrative access" : !isEdited() ? "Nothing was changed" : valid ? "" : "Correct the mistakes first";
        trial.disabled = !valid;
        back.disabled = !isEdited();
        back.hidden = fresh.hidden = !access.admin;
        if (document.activeElement.disabled) area.focus();
    }
    function typed() {
        draft.text = area.value;
        drawLines();
        drawButtons(false, true);
        checking.abort();
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
        checking.abort();
        const { signal } = checking = new AbortController();
        try {
            const found = await cnprocctl([...rulesOption(status), "check", ...draftOption()], { input: draftInput(), signal });
            if (signal.aborted) return;
            const all = [...found.problems.map(one => ({ ...one, level: "bad" })), ...found.warnings.map(one => ({ ...one, level: "warn" }))];
            const here = all.filter(one => one.file === draft.file && one.line), elsewhere = all.filter(one => !here.includes(one));
            offer([...found.files, ...found.problems.map(one => one.file)]);
            drawLines(here);
            drawButtons(found.problems.length === 0);
            fill(verdict, found.problems.length ? alert("bad", `${count(found.problems.length, "mistake")}: the daemon would reject this`)
                : alert("ok", `No mistakes: ${count(found.rules, "rule")} in all files` + (found.warnings.length ? `, ${count(found.warnings.length, "warning")}` : "")),
                 problemList(here, one => goTo(one.line)), problemList(elsewhere));
        } catch (error) {
            if (!signal.aborted) { fill(verdict, failure(error)); drawButtons(false) }
        }
    }

    const mayDiscard = () => ask("Discard the changes?", `${draft.file} was edited and not saved.`, "Discard");
    const undo = async () => { if (await mayDiscard()) { area.value = draft.saved; typed() } };
    async function open(file) {
        const number = ++opened;
        let about = null;
        [note, past, verdict].forEach(box => fill(box));
        drawButtons(false);
        if (file !== draft.file || !isEdited()) {
            try {
                const read = await cnprocctl([...rulesOption(status), "rules", "read", "--", file]);
                if (stopped || number !== opened) return;
                if (!isEdited() || await mayDiscard()) about = take(read);
                else options.line = null;
            } catch (error) {
                about = alert("bad", `Cannot open ${file}`, `${error.message}. ${error.hint}`);
                if (!isEdited()) Object.assign(draft, NOTHING);
            }
        }
        if (stopped || number !== opened) return;
        fill(note, about);
        offer([draft.file]);
        choice.value = draft.file;
        area.value = draft.text;
        area.readOnly = !access.admin || !draft.file || draft.readOnly !== null;
        drawLines();
        drawButtons(false);
        if (options.line) goTo(Number(options.line));
        if (draft.file) check();
    }
    // Edit what was read. Returns what there is to know about the file.
    function take({ file, target, text, newline, hash, read_only: readOnly }) {
        const own = ownCopy(file);
        Object.assign(draft, { file: own, text, saved: text, newline, hash: own === file ? hash : "none", readOnly });
        if (readOnly) return alert("warn", "This file is shown and cannot be edited here", `${readOnly}. Correct it with another editor.`);
        if (own !== file) return alert("info", `Saving makes ${own}`, `It takes precedence over ${file}, which stays as it is.`);
        return target && alert("info", `${file} is a symbolic link`, `Saving changes ${target}.`);
    }
    async function newFile() {
        const field = h("input", { value: "my-rules.yaml", "aria-label": "Name" });
        const name = await ask("New rule file", ["Its name in rules.d: ", field], "Create", field);
        if (!name) return;
        await open(OWN + name);
        if (draft.file === OWN + name && !area.value) {
            area.value = "rules:\n  - name: my-rule\n    events: [nonzero_exit]\n    match:\n      comm: my-program\n";
            typed();
        }
    }
    // The hash names the content that was read: a file that another session changed meanwhile is not overwritten.
    async function store(anyway) {
        drawButtons(false);
        const { text, saved, file } = draft, hash = anyway ? [] : ["--hash", draft.hash];
        try {
            const input = text.replaceAll("\n", draft.newline);
            draft.hash = (await cnprocctl([...rulesOption(status), "rules", "write", ...hash, "--", file], { input, admin: "require" })).hash;
            draft.saved = text;
            fill(note, h("p", { class: "muted" }, `${file} is saved. Loading the rules ...`));
            const outcome = await reload();
            const refused = [outcome].flat()[0].classList.contains("bad");
            fill(note, outcome, refused && button("Put the former content back", () => { draft.text = saved; store(false) }));
        } catch (error) {
            fill(note, error.details?.status === CHANGED
                ? alert("bad", `${file} was changed by another program since it was opened`, "Copy your changes and open the file again, or overwrite it.",
                        button("Overwrite it", () => store(true), { class: "danger" }))
                : alert("bad", `Cannot save ${file}`, `${error.message}. ${error.hint}`));
        }
        if (stopped) return;
        if (area.value !== draft.text) area.value = draft.text;
        check();
    }
    async function tryOnPast() {
        trial.disabled = true;
        fill(past, h("p", { class: "muted" }, "Evaluating past matches ..."));
        try {
            const found = await cnprocctl([...rulesOption(status), "replay", "--history", "-n", String(PAST), ...draftOption()], { input: draftInput() });
            if (!stopped) drawPast(found.events.reverse());
        } catch (error) { fill(past, failure(error)) }
        trial.disabled = false;
        if (document.activeElement === document.body) trial.focus();
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

    offer([status?.files[0] ?? MAIN_FILE, ...(status?.files ?? []), ...(status?.reload.changed_files ?? [])]);
    open(options.file ?? draft.file ?? choice.value).then(() => options.match && tryOnPast());
    return { stop: () => { stopped = true; clearTimeout(timer); checking.abort() } };
}
