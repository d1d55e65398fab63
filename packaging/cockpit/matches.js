// The matches that the page knows: the newest of the history, then each one as the daemon reports it.

import { PageError, call, watch } from "./daemon.js";

const MOST_KEPT = 2000;
const FIRST = 300, PAGE = 500, AGAIN_MS = 1000;

// `list` is in the order in which the daemon reported them, the newest first: clocks may be wrong. `most` are kept.
export const matches = { list: [], most: MOST_KEPT, skipped: 0, complete: false };
const listeners = new Set();

// Call `f(fresh)` with the new matches, newest first, or with null if the whole list is another one.
export function follow(f) {
    listeners.add(f);
    return () => listeners.delete(f);
}

const publish = fresh => listeners.forEach(f => f(fresh));

function add(found) {
    const known = new Set(matches.list.map(one => one.match_id));
    const fresh = found.filter(one => one.match_id == null || !known.has(one.match_id));
    if (!fresh.length) return;
    const all = [...fresh, ...matches.list];
    if (all.length > matches.most) matches.complete = false;
    matches.list = all.slice(0, matches.most);
    publish(fresh);
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
        if (found.length) await catchUp();  // a reply holds what fits into a message
    } catch (error) {
        if (!(error instanceof PageError) || error.kind !== "refused") throw error;
        matches.list = [];  // that match is no longer kept: begin again
        publish(null);
        await catchUp();
    }
}

// Read older matches into the list, which may then be longer.
export async function older() {
    const oldest = matches.list.findLast(one => one.match_id && !one.held_by)?.match_id;
    const { matches: found } = await call("History", { before: oldest, limit: PAGE });
    matches.list = [...matches.list, ...found];
    matches.most = matches.list.length + MOST_KEPT;
    matches.complete = found.length < PAGE;
    publish(null);
}

// Stay connected for as long as the page is open. `onState` is called when the connection begins or ends.
export function connect(onState) {
    let waiting = [], timer = 0, missing = 0;
    const flush = () => {
        timer = 0;
        if (missing) return;  // what the history has is older: it comes first
        const found = waiting.reverse();
        waiting = [];
        add(found);
    };
    const readMissing = () => {
        missing++;
        catchUp().catch(onState).finally(() => { missing--; flush() });
    };
    const begin = () => watch(reply => {
        if (reply.ready) {
            onState(null);
            readMissing();
        }
        if (reply.skipped) {
            matches.skipped += reply.skipped;
            readMissing();
        }
        if (reply.match) waiting.push(reply.match);
        if (waiting.length && !timer) timer = setTimeout(flush, 50);  // a burst is one change of the page
    }, error => {
        onState(error);
        setTimeout(begin, error.kind === "no-permission" ? 10 * AGAIN_MS : AGAIN_MS);
    });
    begin();
}
