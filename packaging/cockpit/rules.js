// Rules: what is in force, hits, price, where each rule stands; enable, disable (for a time), reload.

import { access, call, cnprocctl, run } from "./daemon.js";
import { alert, announce, badge, button, card, count, empty, facts, failure, fill, h, onChange, row, table, time } from "./dom.js";

const cockpit = window.cockpit;
const MAIN_FILE = "/etc/cnprocd/rules.yaml";
const HEADS = ["Rule", "State", "Hits", "Last hit", "Price", "Files", "Actions"];
const TIMES = [["", "until enabled"], ["1h", "for 1 hour"], ["8h", "for 8 hours"], ["1d", "for 1 day"], ["7d", "for 7 days"]];
const periods = new Map();  // how long the rules are disabled that the viewer may disable next
const PRICES = ["free", "cheap", "moderate", "dear", "very dear"], MOST_ROWS = 300, MOST_PROBLEMS = 100;

// The option that lets commands read the files of a daemon that was started with other ones.
export const rulesOption = status => !status || status.files[0] === MAIN_FILE ? [] : ["--rules", status.files[0]];

export function problemList(problems, onPlace) {
    return h("ul", { class: "problems" }, problems.slice(0, MOST_PROBLEMS).map(one => h("li", {},
        badge(one.level ?? "bad", one.level === "warn" ? "warning" : "error"),
        onPlace ? button(`line ${one.line}`, () => onPlace(one), { "aria-label": `Go to ${one.file} line ${one.line}` })
                : h("span", {}, one.file, one.line ? `:${one.line}:${one.column} ` : " "),
        " ", one.message, one.accepted && h("div", { class: "muted" }, "accepted: ", one.accepted),
        one.hint && h("div", { class: "muted" }, "hint: ", one.hint))),
        problems.length > MOST_PROBLEMS && h("li", {}, `and ${problems.length - MOST_PROBLEMS} others`));
}

// Load the files. Resolves to what to show about it.
export async function reload() {
    try {
        const { rules, warnings } = await call("Reload");
        announce("Rules loaded");
        return [alert("ok", `Loaded: ${rules} ${rules === 1 ? "rule is" : "rules are"} in force`),
                problemList(warnings.map(one => ({ ...one, level: "warn" })))];
    } catch (error) {
        const refused = error.details?.problems;
        return refused ? [alert("bad", "The reload was refused; the rules in force are as before", error.message), problemList(refused)]
                       : failure(error);
    }
}

export function rulesView(main, { path, status }) {
    return path.length ? oneRule(main, path[0], status) : allRules(main, status);
}

function stateOf(rule) {
    if (rule.in_force === false) return badge("warn", "not in force");
    if (rule.enabled) return badge("ok", "enabled");
    return rule.disabled_until_ns ? [badge("info", "disabled"), " until ", time(rule.disabled_until_ns)] : badge("info", "disabled");
}

const priceOf = ({ cost, cost_means: means }) => cost == null ? "-" : `${PRICES[cost]} (${cost} of 4): ${means}`;
const FILES = { changed: "changed in the files", removed: "removed from the files", new: "new in the files" };
export const placeOf = rule => rule.file && h("a", {
    href: `#/edit?${new URLSearchParams({ file: rule.file, line: rule.line })}`, "data-key": `place-${rule.name}`,
}, `${rule.file.split("/").at(-1)}:${rule.line}`);

// Enable, or disable for a time. The choice of the time changes nothing by itself: a key on it must not disable a rule.
// `after` gets an error or null.
function toggle(rule, status, after) {
    if (!access.admin) return "-";
    const act = args => run(["cnprocctl", ...rulesOption(status), "rules", ...args, "--", rule.name], { admin: "require" }).done
            .then(({ error }) => { if (!error) announce(`${rule.name}: ${args[0]}d`); after(error) });
    if (!rule.enabled)
        return button("Enable", () => act(["enable"]), { "data-key": `toggle-${rule.name}`, "aria-label": `Enable ${rule.name}` });
    const choice = h("select", { "aria-label": `How long ${rule.name} is disabled`, "data-key": `for-${rule.name}`,
                                 onchange: () => periods.set(rule.name, choice.value) },
                     TIMES.map(([value, label]) => h("option", { value, selected: value === periods.get(rule.name) }, label)));
    return [button("Disable", () => act(["disable", ...(choice.value ? ["--for", choice.value] : [])]),
                   { "data-key": `toggle-${rule.name}`, "aria-label": `Disable ${rule.name}` }), choice];
}

function allRules(main, status) {
    const note = h("div"), changed = h("div"), list = h("div", {}, "Loading ...");
    const filter = h("input", { type: "search", placeholder: "rule, file, description ...", "aria-label": "Filter rules", oninput: () => draw() });
    const actions = h("div", { class: "toolbar" },
        access.admin && button("Reload", async () => { fill(note, await reload()); again() }, { class: "primary" }),
        button(access.admin ? "Edit" : "View files", () => cockpit.location.go(["edit"])), filter);
    fill(main, card("Rules", actions, note, changed, list));
    let listed = null, loaded = null;
    const again = () => { loaded = null; poll(status).catch(() => null) };  // the next poll reports it
    const after = error => { fill(note, error && failure(error)); again() };
    const drawList = onChange(({ rules, fitting }) => fill(list, fitting > rules.length && h("p", { class: "muted" },
        `The first ${rules.length} of ${count(fitting, "rule")} are shown; filter to see others.`),
        rules.length ? table("Rules", HEADS, rules.map(rule => row(HEADS, [
            [h("a", { href: `#/rules/${encodeURIComponent(rule.name)}`, "data-key": `rule-${rule.name}` }, h("bdi", {}, rule.name)),
             h("div", { class: "muted" }, rule.description)],
            stateOf(rule), (rule.hits ?? 0).toLocaleString(), time(rule.last), priceOf(rule), [placeOf(rule), " ",
                rule.files !== "same" && FILES[rule.files] && badge("warn", FILES[rule.files])],
            toggle(rule, status, after),
        ]))) : listed.length ? empty("No rule fits the filter")
            : empty("No rules", "Write the first one with Edit, or copy one of /usr/share/doc/cnprocd/examples.")));
    function draw() {
        fill(changed, status.reload.changed_files?.length > 0 && alert("warn", "The rule files differ from the rules in force",
            `Reload loads them: ${status.reload.changed_files.join(", ")}`), !status.reload.ok && alert("bad",
            "The last reload failed; the rules in force are older than the files", status.reload.error));
        if (!listed || list.querySelector("select:focus")) return;  // an open choice stays open
        const now = new Map(status.rules.map(one => [one.name, one])), word = filter.value.toLowerCase();
        const fitting = listed.filter(one => `${one.name} ${one.file} ${one.description}`.toLowerCase().includes(word));
        drawList({ fitting: fitting.length, rules: fitting.slice(0, MOST_ROWS).map(one => ({
            ...one, hits: now.get(one.name)?.hits, last: now.get(one.name)?.last_hit_ns })) });
    }
    async function poll(now) {
        status = now;
        draw();
        const next = JSON.stringify([now.rules_hash, now.reload, now.rules.map(one => one.enabled)]);
        if (next === loaded) return;
        loaded = next;
        try {
            listed = await cnprocctl([...rulesOption(status), "rules", "list"]);
            draw();
        } catch (error) { loaded = null; throw error }
    }
    return { poll };
}

function oneRule(main, name, status) {
    const body = h("div", {}, "Loading ...");
    fill(main, h("p", {}, h("a", { href: "#/rules" }, "\u2190 Rules")), card("Rule", body));
    const known = status.rules.find(one => one.name === name);
    cnprocctl([...rulesOption(status), "rules", "show", "--", name]).then(({ plan, text, ...rule }) => fill(body, facts([
        ["Rule", h("bdi", {}, name)], ["Place", placeOf(rule)], ["Hits", known?.hits], ["Last hit", known && time(known.last_hit_ns)],
        ["Price", plan && priceOf(plan)], ["Identity", plan && `${plan.identity}: ${plan.identity_means}`]]),
        h("pre", { tabindex: "0", "aria-label": "The rule with all its defaults" }, text)), error => fill(body, failure(error)));
    return {};
}
