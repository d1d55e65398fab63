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

// Cockpit's bridge in Python (Debian 13) closes with "terminated" and the text of the OSError, the one in C with a problem.
function channelError({ problem, message = "" }) {
    if (problem === "access-denied" || problem === "authentication-failed" || message.startsWith("[Errno 13]"))
        return new PageError("no-permission", "Permission denied",
                             "Turn on administrative access in Cockpit, or join the group cnprocd.");
    if (problem === "not-found" || problem === "no-host" || /^\[Errno (2|111)\]/.test(message))
        return new PageError("not-running", "cnprocd is not running", "Start the service.");
    return new PageError("not-running", `Connection to cnprocd closed: ${message || problem || "it ended"}`,
                         "The page connects again by itself.");
}

function replyError(reply) {
    const { what, hint, ...details } = reply.parameters ?? {};
    const denied = reply.error === "org.varlink.service.PermissionDenied";
    return new PageError(denied ? "no-permission" : "refused", what ?? reply.error,
                         hint ?? (denied ? "Turn on administrative access in Cockpit, or join the group cnprocd." : ""),
                         details);
}

// Send one call. Every reply goes to `onReply`; `onEnd` gets a PageError, or null after a complete answer.
function send(method, parameters, more, onReply, onEnd) {
    const channel = cockpit.channel({ payload: "stream", unix: SOCKET, binary: true, superuser: "try" });
    const decoder = new TextDecoder();
    let rest = "";
    let ended = false;
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
    return { close: () => { ended = true; channel.close() } };
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
    return send("Watch", {}, true, onReply, error => onEnd(error ?? channelError({})));
}

// Run a program. Resolves to {output, error}; `error` is null, or a PageError if the exit status is not 0.
// With `open`, standard input stays open until stop(): cnprocctl --until-eof then ends as after a signal.
export function run(argv, { input = "", admin = "try", onOutput, open = false, err = "message" } = {}) {
    const process = cockpit.spawn(argv, { superuser: admin, err });
    let output = "";
    const done = new Promise(resolve => {
        process.stream(data => {
            output += data;
            if (onOutput) output = onOutput(output);
        });
        process.then(() => resolve({ output, error: null }), problem => resolve({ output, error: spawnError(argv[0], problem) }));
    });
    process.input(input, open);
    return { done, stop: () => process.input() };
}

function spawnError(program, problem) {
    if (problem.problem === "not-found")
        return new PageError("not-installed", `${program} is not installed`, "Install the package cnprocd.");
    if (problem.problem === "access-denied")
        return new PageError("no-permission", "Permission denied", "Turn on administrative access in Cockpit.");
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
