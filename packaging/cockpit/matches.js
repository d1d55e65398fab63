// The matches that the page knows: the newest of the history, then each one as the daemon reports it.

import { PageError, call, watch } from "./daemon.js";

export const MOST_KEPT = 2000;
const FIRST = 300, PAGE = 500, AGAIN_MS = 1000;

export const matches = { list: [], skipped: 0, complete: false, connected: false };
const listeners = new Set();

// Call `f(fresh)` with the new matches, newest first, or with null if the whole list is another one.
export function follow(f) {
    listeners.add(f);
    return () => listeners.delete(f);
}

const publish = fresh => listeners.forEach(f => f(fresh));

function add(found) {
    const known = new Set(matches.list.slice(0, MOST_KEPT).map(one => one.match_id));
    const fresh = found.filter(one => one.match_id == null || !known.has(one.match_id));
    if (!fresh.length) return;
    const newest = matches.list[0]?.time_ns ?? 0, all = [...fresh, ...matches.list].sort((a, b) => b.time_ns - a.time_ns);
    if (all.length > MOST_KEPT) matches.complete = false;
    matches.list = all.slice(0, MOST_KEPT);
    publish(fresh.every(one => one.time_ns >= newest) ? fresh : null);
}

// The history that the stream did not bring: the newest matches at first, later those after the newest known one.
async function catchUp() {
    const newest = matches.list.find(one => one.match_id && !one.held_by)?.match_id;
    if (newest === undefined) {
        const found = (await call("History", { limit: FIRST })).matches;
        matches.complete = found.length < FIRST;
        add(found);
        return;
    }
    try {
        const found = (await call("History", { after: newest, limit: PAGE })).matches.reverse();
        add(found);
        if (found.length === PAGE) await catchUp();
    } catch (error) {
        if (!(error instanceof PageError) || error.kind !== "refused") throw error;
        matches.list = [];  // that match is no longer kept: begin again
        publish(null);
        await catchUp();
    }
}

// Read `limit` older matches into the list. Resolves to how many there were.
export async function older(limit = PAGE) {
    const oldest = matches.list.at(-1);
    const { matches: found } = await call("History", { until_ns: oldest ? oldest.time_ns : null, limit });
    const known = new Set(matches.list.map(one => one.match_id));
    const fresh = found.filter(one => !known.has(one.match_id));
    matches.list = [...matches.list, ...fresh];
    matches.complete = found.length < limit;
    publish(null);
    return fresh.length;
}

// Stay connected for as long as the page is open. `onState` is called when the connection begins or ends.
export function connect(onState) {
    let waiting = [];
    let timer = 0;
    const flush = () => {
        timer = 0;
        const found = waiting.reverse();
        waiting = [];
        add(found);
    };
    const begin = () => watch(reply => {
        if (reply.ready) {
            matches.connected = true;
            onState(null);
            catchUp().catch(onState);
        }
        if (reply.skipped) {
            matches.skipped += reply.skipped;
            catchUp().catch(onState);
        }
        if (reply.match) waiting.push(reply.match);
        if (waiting.length && !timer) timer = setTimeout(flush, 50);  // a burst is one change of the page
    }, error => {
        matches.connected = false;
        onState(error);
        setTimeout(begin, error.kind === "no-permission" ? 10 * AGAIN_MS : AGAIN_MS);
    });
    begin();
}
