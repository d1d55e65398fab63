"""The Varlink interface of the control socket, as text. PURE.

`python packaging/manual.py` writes it to config/io.cnprocd.varlink, which the packages install. Tests compare it with
the verbs that the daemon has and with what they return.
"""

from __future__ import annotations

DESCRIPTION = """\
# The control socket of cnprocd, /run/cnprocd/control.sock. Root may call every method. Members of the group cnprocd may
# call those that change nothing. Times in nanoseconds are of the wall clock since 1970, if nothing else is stated.
# Objects are those of `cnprocctl --json`; cnprocd-fields(7) describes the fields of a match.
interface io.cnprocd

# The problem of a rule file. Line and column count from 1; line 0 is the whole file.
type Problem (
  file: string,
  line: int,
  column: int,
  message: string,
  accepted: string,
  hint: string,
  source_line: string
)

# Return the state of the daemon and the hits of each rule.
method Status() -> (
  version: string,
  pid: int,
  started_ns: int,
  uptime_s: float,
  owned_directories: []string,
  files: []string,
  rules_hash: string,
  reload: object,
  hits_since_ns: int,
  rules: []object,
  events: object,
  lost: object,
  table: object,
  jobs: object,
  log: object,
  stalls: object,
  edges: []object,
  kernel: object
)

# Return the counters as text for Prometheus.
method Metrics() -> (text: string)

# Return a rule in force with all its defaults.
method Rule(name: string) -> (rule: object)

# Return the digest of each rule in force, by name.
method Digests() -> (digests: [string]string)

# Load the rule files. Return when the new rules are in force. For root.
method Reload() -> (rules: int, files: []string, rules_hash: string, warnings: []Problem)

# Return the newest jobs, without their events. The state is waiting, running, done or dead; the rule is a glob.
# A note states what is missing if the disk does not answer.
method Jobs(state: ?string, rule: ?string, limit: ?int) -> (jobs: []object, note: ?string)

# Return one job with its events.
method Job(job_id: int) -> (job: object)

# Return the output of the last attempt of a job.
method Output(job_id: int) -> (job_id: int, state: string, attempt: int, output: string, note: ?string)

# Let a dead job wait again. For root.
method Retry(job_id: int) -> (job_id: int, state: string)

# Let all dead jobs wait again, or those of a rule. For root.
method RetryDead(rule: ?string) -> (job_ids: []int)

# End a running hook. The job is dead, unless it is to be retried. For root.
method Kill(job_id: int, retry: ?bool) -> (job_id: int, state: string)

# Cancel a waiting job. For root.
method Drop(job_id: int) -> (job_id: int, state: string)

# Cancel all waiting jobs, or those of a rule. Those that a flood has deferred are not jobs yet: `deferred` is their
# number. For root.
method DropWaiting(rule: ?string) -> (job_ids: []int, deferred: int)

# Return past matches, the newest first. Rule, comm and unit are globs. With `after`, the match_id of a match, return
# the first ones that follow it, the oldest first; "" begins with the oldest one. Then a reply holds as many as fit into
# a message: go on after the last one until there are no more. With `before`, return the newest of those that this match
# follows.
method History(
  rule: ?string,
  comm: ?string,
  unit: ?string,
  pid: ?int,
  uid: ?int,
  user: ?string,
  since_ns: ?int,
  until_ns: ?int,
  limit: ?int,
  after: ?string,
  before: ?string,
  match_id: ?string
) -> (matches: []object, note: ?string)

# Count past matches by rule, unit or kind (by; rule if it is null) in periods of per_s seconds (60), from since_ns
# until now, at most 1440 periods. A count has at_ns, the begin of its period; key, null if the unit is unknown; and
# count. The keys with the fewest matches are counted together as "others".
method Counts(by: ?string, since_ns: ?int, per_s: ?int) -> (counts: []object, note: ?string)

# Subscribe to matches. Call it with `more`. The first reply has `ready`; every match from then on follows in a reply of
# its own. If the client reads too slowly, matches are skipped, and the next reply has their number. A match that a
# throttle held back has `held_by`.
method Watch() -> (ready: ?bool, match: ?object, skipped: ?int)

# Every error has these parameters: one line that states what failed, a hint, and the exit status of cnprocctl.
error Failed (what: string, hint: string, status: int)

# There is no such rule, job or match.
error NotFound (what: string, hint: string, status: int)

# The job is in another state.
error WrongState (what: string, hint: string, status: int)

# The rule files are invalid. The daemon keeps the current rules.
error RulesRejected (what: string, hint: string, status: int, rendered: string, problems: []Problem)

# Too many clients are connected. The daemon closes the connection.
error TooManyClients (what: string, hint: string, status: int)

# The reply would be longer than 1 MiB.
error TooLong (what: string, hint: string, status: int)

# The message is not a call. The daemon closes the connection.
error InvalidMessage (what: string, hint: string, status: int)
"""

SERVICE_DESCRIPTION = """\
# The interface that every Varlink service has.
interface org.varlink.service

# Return the service and its interfaces.
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

# Return the description of an interface.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied ()

error ExpectedMore ()
"""
