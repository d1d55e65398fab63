// The two ways to cnprocd: its control socket, which speaks Varlink (docs/subscribing.md), and `cnprocctl --json`.
//
// The socket answers at once and starts no process, so polls and the stream of matches use it. Commands are for what
// only they can do: check, explain, replay, record.

const cockpit = window.cockpit;
const SOCKET = "/run/cnprocd/control.sock";

// `kind`: not-running, not-installed, no-permission, or refused (the daemon or the command answered no).
export class PageError extends Error {
    constructor(kind, message, hint = "", details = {}) {
        super(message);
        Object.assign(this, { kind, hint, details });
    }
}

const denied = () => new PageError("no-permission", "Permission denied",
                                   "Turn on administrative access in Cockpit, or join the group cnprocd.");

// Cockpit's bridge in Python (Debian 13) closes with "terminated" and the text of the OSError, the one in C with a problem.
function channelError({ problem, message = "" }) {
    if (problem === "access-denied" || problem === "authentication-failed" || message.startsWith("[Errno 13]")) return denied();
    if (problem === "not-found" || problem === "no-host" || /^\[Errno (2|111)\]/.test(message))
        return new PageError("not-running", "cnprocd is not running", "Start the service.");
    return new PageError("not-running", `Connection to cnprocd closed: ${message || problem || "it ended"}`,
                         "The page connects again by itself.");
}

function replyError({ error, parameters }) {
    if (error === "org.varlink.service.PermissionDenied") return denied();
    const { what = error, hint, ...details } = parameters ?? {};
    return new PageError("refused", what, hint, details);
}

// Send one call. Every reply goes to `onReply`; `onEnd` gets a PageError, or null after a complete answer.
function send(method, parameters, more, onReply, onEnd) {
    const channel = cockpit.channel({ payload: "stream", unix: SOCKET, binary: true, superuser: "try" });
    const decoder = new TextDecoder();
    let rest = "";
    let ended = false;  // closing the channel closes it once more
    const end = error => {
        if (!ended) {
            ended = true;
            channel.close();
            onEnd(error);
        }
    };
    channel.addEventListener("message", (_, data) => {
        const texts = (rest + decoder.decode(new Uint8Array(data), { stream: true })).split("\0");
        rest = texts.pop();
        for (const text of texts) {
            const reply = JSON.parse(text);
            if (reply.error) return end(replyError(reply));
            onReply(reply.parameters ?? {});
            if (!reply.continues) return end(null);
        }
    });
    channel.addEventListener("close", (_, options) => end(channelError(options)));
    channel.send(new TextEncoder().encode(JSON.stringify({ method: `io.cnprocd.${method}`, parameters, more }) + "\0"));
}

// Call a method. Rejects with a PageError.
export function call(method, parameters = {}) {
    return new Promise((resolve, reject) => {
        let found = {};
        send(method, parameters, false, reply => { found = reply }, error => error ? reject(error) : resolve(found));
    });
}

// Subscribe to matches. `onEnd` gets the reason when the stream has ended.
export function watch(onReply, onEnd) {
    send("Watch", {}, true, onReply, error => onEnd(error ?? channelError({})));
}

// Run a program. `done` resolves to {output, error}; `error` is null, or a PageError if the exit status is not 0. With
// `onLine`, standard input stays open, see write() and end(), and it gets each line of the output, which is JSON.
// `signal`: of an AbortController that ends the program.
export function run(argv, { input = "", admin = "try", onLine, signal } = {}) {
    const process = cockpit.spawn(argv, { superuser: admin, err: "message" });
    let output = "";
    const done = new Promise(resolve => {
        process.stream(data => {
            output += data;
            const lines = onLine ? output.split("\n") : [output];
            output = lines.pop();
            for (const line of lines) onLine(JSON.parse(line));
        });
        process.then(() => resolve({ output, error: null }), problem => resolve({ output, error: spawnError(argv[0], problem) }));
    });
    process.input(input, Boolean(onLine));
    signal?.addEventListener("abort", () => process.close("cancelled"));
    return { done, write: text => process.input(text, true), end: () => process.input() };
}

function spawnError(program, problem) {
    if (problem.problem === "not-found")
        return new PageError("not-installed", `${program} is not installed`, "Install the package cnprocd.");
    if (problem.problem === "access-denied") return denied();
    const lines = String(problem.message).trim().split("\n");
    return new PageError("refused", lines[0].replace(/^cnprocctl: (error: )?/, ""), lines.slice(1).join("\n"),
                         { status: problem.exit_status });
}

// Run cnprocctl. Resolves to its JSON even if the exit status is not 0; rejects if it is an error, or none.
export async function cnprocctl(args, options) {
    const { output, error } = await run(["cnprocctl", "--json", ...args], options).done;
    let found;
    try {
        found = JSON.parse(output);
    } catch {
        throw error ?? new PageError("refused", `cnprocctl ${args[0]} printed no JSON`);
    }
    if (found.error) throw new PageError("refused", found.error.what, found.error.hint, found.error);
    return found;
}

// Run a command that prints lines of JSON until end(). `done` resolves to an error, or null.
export function follow(args, onLine) {
    let refused = null;
    const process = run(["cnprocctl", "--json", ...args], { admin: "require", onLine: found => {
        if (found.error) refused = new PageError("refused", found.error.what, found.error.hint);
        else onLine(found);
    } });
    return { ...process, done: process.done.then(({ error }) => refused ?? error) };
}

// Administrative access. `onChange` is called at once when it is known, and when it changes.
export const access = { admin: false };
export function followAccess(onChange) {
    const permission = cockpit.permission({ admin: true });
    const update = () => {
        access.admin = permission.allowed === true;
        onChange();
    };
    permission.addEventListener("changed", update);
    if (permission.allowed !== null) update();
}
