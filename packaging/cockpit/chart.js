// Matches per minute as stacked bars, drawn as SVG. The list below it has the totals, and so has its label for screen readers.

import { h, svg } from "./dom.js";

const WIDTH = 900, HEIGHT = 150, LEFT = 44, BOTTOM = 20;
const MOST_GROUPS = 6;  // as many as there are colours
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

// Return the largest groups, the others as one, and the number of the group of each key.
function grouped(counts) {
    const totals = new Map();
    for (const { key, count } of counts) totals.set(key, (totals.get(key) ?? 0) + count);
    const keys = [...totals.keys()].sort((a, b) => totals.get(b) - totals.get(a));
    const last = keys.length > MOST_GROUPS ? MOST_GROUPS - 1 : keys.length, others = keys.slice(last);
    const groups = keys.slice(0, last).map(key => ({ label: key ?? "unknown", total: totals.get(key) }));
    if (others.length) groups.push({ label: `${others.length} others`, total: others.reduce((sum, key) => sum + totals.get(key), 0) });
    return { groups, numberOf: new Map(keys.map((key, i) => [key, Math.min(i, last)])) };
}

function ceiling(most) {
    const power = 10 ** Math.floor(Math.log10(Math.max(1, most)));
    return [1, 2, 5, 10].map(step => step * power).find(step => step >= most);
}

// `counts`: [{at_ns, key, count}]; `from_s` to `to_s` in steps of `per_s`.
export function chart(label, counts, from_s, to_s, per_s) {
    const { groups, numberOf } = grouped(counts);
    const steps = Math.max(1, Math.ceil((to_s - from_s) / per_s));
    const columns = Array.from({ length: steps }, () => groups.map(() => 0));
    for (const one of counts) {
        const column = columns[Math.floor((one.at_ns / 1e9 - from_s) / per_s)];
        if (column) column[numberOf.get(one.key)] += one.count;
    }
    const top = ceiling(Math.max(1, ...columns.map(column => column.reduce((a, b) => a + b, 0))));
    const plot = HEIGHT - BOTTOM - 8, step = (WIDTH - LEFT) / steps;
    const x = at_s => LEFT + (at_s - from_s) / per_s * step;
    const y = value => 8 + plot * (1 - value / top);
    const bars = columns.flatMap((column, i) => {
        let below = 0;
        const at = clock.format(new Date((from_s + i * per_s) * 1000));
        return column.map((value, g) => {
            if (!value) return null;
            below += value;
            return svg("rect", {
                class: `group${g}`, x: (LEFT + i * step).toFixed(1), width: Math.max(1, step - (step > 3 ? 1 : 0)).toFixed(1),
                y: y(below).toFixed(1), height: Math.max(1, plot * value / top).toFixed(1),
            }, svg("title", {}, `${at}: ${value} ${groups[g].label}`));
        });
    });
    const lines = [0, top / 2, top].filter(Number.isInteger).map(value => [
        svg("line", { x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }),
        svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toLocaleString()),
    ]);
    const every_s = [300, 600, 900, 1800, 3600, 7200, 14400].find(one => (to_s - from_s) / one <= 8) ?? 14400;
    const hours = [];
    for (let at = Math.ceil(from_s / every_s) * every_s; at < to_s; at += every_s)
        if (x(at) > LEFT + 20 && x(at) < WIDTH - 20)
            hours.push(svg("text", { x: x(at).toFixed(1), y: HEIGHT - 4, "text-anchor": "middle" }, clock.format(new Date(at * 1000))));
    const total = counts.reduce((sum, one) => sum + one.count, 0);
    const summary = `${label}: ${total} in all; ` + groups.map(group => `${group.label} ${group.total}`).join(", ");
    return [
        svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary, class: "chart" }, lines, hours, bars),
        h("ul", { class: "legend" }, groups.map((group, g) => h("li", {},
            svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { class: `group${g}`, width: 10, height: 10 })),
            h("bdi", {}, group.label), h("span", { class: "muted" }, ` ${group.total.toLocaleString()}`)))),
    ];
}
