// Elements, text and times. All text of the page passes through text nodes: comm and cmdline are hostile, and no string
// is ever parsed as HTML.

// Control, bidi and invisible characters could hide or reverse what stands beside them. The daemon escapes them in
// records; this is for text from elsewhere (output of hooks, error messages, rule names).
const INVISIBLE = /(?![\t\n])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;
const READ_OUT = new Set(["title", "aria-label", "placeholder"]);

export function visible(text) {
    return String(text).replace(INVISIBLE, c => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

function make(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else if (value === true) element.setAttribute(name, "");
        else if (value !== false && value != null) element.setAttribute(name, READ_OUT.has(name) ? visible(value) : value);
    }
    for (const child of children.flat(Infinity))
        if (child != null && child !== false) element.append(child instanceof Node ? child : visible(child));
    return element;
}

// h("a", {href: "#/", onclick: f}, "text", node, [more]): null and false are left out.
export const h = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
    make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Give the keyboard focus to the element with this data-key, or to the view.
function focusKey(key) {
    const found = key && document.querySelector(`[data-key="${CSS.escape(key)}"]`);
    (found || document.getElementById("view")).focus({ preventScroll: true });
}

// Replace what an element holds. The focus goes to the element with the same data-key, or to the view.
export function fill(element, ...children) {
    const focused = element !== document.activeElement && element.contains(document.activeElement) && document.activeElement;
    element.replaceChildren();
    make(element, {}, children);
    if (focused) focusKey(focused.dataset.key);
}

// Call draw(value) only if the value is another one than before: selections and focus survive a poll without news.
export function onChange(draw) {
    let before;
    return value => {
        const now = JSON.stringify(value);
        if (now !== before) {
            before = now;
            draw(value);
        }
    };
}

const TODAY = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const OTHER_DAY = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const EXACT = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

// A time in the zone of the browser; on hover the exact one, local and UTC.
export function time(ns) {
    if (ns == null) return "-";
    const at = new Date(ns / 1e6);
    const format = at.toDateString() === new Date().toDateString() ? TODAY : OTHER_DAY;
    return h("time", { datetime: at.toISOString(), title: `${EXACT.format(at)}\n${at.toISOString()}` }, format.format(at));
}

export function duration(s) {
    if (s == null) return "-";
    for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]])
        if (s >= 2 * size) return `${Math.floor(s / size)} ${unit}`;
    return s >= 1 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : `${(s * 1000).toFixed(s < 0.01 ? 1 : 0)} ms`;
}

export const count = (n, one, many = one + "s") => `${n.toLocaleString()} ${n === 1 ? one : many}`;

// A word with a colour and a sign: never the colour alone.
const SIGNS = { ok: "\u2713", warn: "!", bad: "\u2717", info: "\u2022" };
export function badge(level, text, title) {
    return h("span", { class: `badge ${level}`, title }, h("span", { "aria-hidden": "true" }, SIGNS[level] + " "), text);
}

export function button(label, onclick, attributes = {}) {
    return h("button", { type: "button", onclick, ...attributes }, label);
}

export function table(caption, heads, rows, attributes = {}) {
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${caption}, as a table`, "data-key": `table-${caption}` },
             h("table", attributes,
               h("caption", { class: "hidden" }, caption),
               h("thead", {}, h("tr", {}, heads.map(head => h("th", { scope: "col" }, head)))),
               h("tbody", {}, rows)));
}

// A row. Each cell is labelled with its head, for narrow screens.
export function row(heads, cells, attributes = {}) {
    return h("tr", attributes, cells.map((cell, i) => h("td", { "data-label": heads[i] }, cell)));
}

export function facts(pairs) {
    return h("dl", {}, pairs.filter(([, value]) => value != null && value !== "")
            .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

export function card(title, ...children) {
    return h("section", { class: "card", "aria-label": title }, h("h2", {}, title), children);
}

export function empty(title, advice, ...actions) {
    return h("div", { class: "empty" }, h("h2", {}, title), advice && h("p", {}, advice), actions);
}

export function alert(level, title, detail, ...actions) {
    return h("div", { class: `alert ${level}`, role: level === "bad" ? "alert" : "status" },
             h("strong", {}, title), detail && h("p", { class: "detail" }, detail), actions);
}

export function failure(error) {
    return alert("bad", error.message, error.hint);
}

export function announce(text) {
    document.getElementById("announce").textContent = visible(text);
}

// Ask before something that cannot be undone, or for a text. Resolves to the text, true, or false; Escape is no. The focus
// returns to what had it, which a poll may have drawn again.
export function ask(question, detail, yes, field = null) {
    const before = document.activeElement;
    return new Promise(resolve => {
        const onclose = () => {
            box.remove();
            if (before.isConnected) before.focus();
            else focusKey(before.dataset.key);
            resolve(box.returnValue === "yes" && (field ? field.value : true));
        };
        const box = h("dialog", { "aria-label": question, onclose }, h("h2", {}, question), h("form", { method: "dialog" }, h("p", {}, detail, field),
                        h("button", { value: "yes", class: "danger" }, yes), h("button", { value: "no", autofocus: !field }, "Cancel")));
        document.body.append(box);
        box.showModal();
    });
}

// Answer an open question with no: what it was about is no longer shown.
export function closeDialogs() {
    document.querySelectorAll("dialog").forEach(box => box.close("no"));
}
