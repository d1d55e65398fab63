"""`cnprocctl explain`: what the rules cost, and why a rule matches an event or does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain, repeat

from cnprocd.cli.drafts import draft_of
from cnprocd.cli.grammar import FEATURES, Options
from cnprocd.cli.plans import RulePlan, WholePlan, rule_plan, whole_plan
from cnprocd.cli.reasons import Explained, explain_all
from cnprocd.cli.rule_names import is_glob, no_such_rule, wanted
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.terminal import Style, print_json
from cnprocd.cli.verbs.trial import ACCOUNTS, described, occurrence_from
from cnprocd.connector.request import Features
from cnprocd.control.client import Client
from cnprocd.errors import EX_OK, CnprocdError, NotFoundError
from cnprocd.json_value import JsonDict, as_dict, get_bool, get_dict, get_list
from cnprocd.process.file_names import FileNames, look_up_here
from cnprocd.process.model import Occurrence
from cnprocd.rules.compile import CompiledRule, Matcher, compile_rule
from cnprocd.rules.plan import make_plan

_PRICES = {"none": "the event", "taskstats": "the exit record", "procfs": "/proc", "table": "the table"}

_VERDICTS = {True: ("yes", "green"), False: ("no", "red"), None: ("unknown", "yellow")}


def explain(options: Options) -> int:
    """Show the plan; or with an event, the reasons for and against a match."""
    loaded = loaded_rules(options.rules, draft=draft_of(options))
    rules = [compile_rule(rule, order) for order, rule in enumerate(loaded.rules) if rule.enabled]
    if options.rule is not None:
        rules = [rule for rule in rules if wanted(rule.name, options.rule)]
        if not rules and is_glob(options.rule) and not options.json:
            print("no rules")
            return EX_OK
        if not rules and not is_glob(options.rule):
            names = [rule.name for rule in loaded.rules]
            if options.rule not in names:
                raise no_such_rule(options.rule, names)
            raise NotFoundError(f'the rule "{options.rule}" is disabled', f"cnprocctl rules enable {options.rule}")
    event = described(options)
    if options.job is not None or event:
        matcher = Matcher(loaded.rules)
        occurrence = _of_job(options) if options.job is not None else occurrence_from(options, event, matcher)
        return _reasons([explain_all(rule, occurrence) for rule in rules], occurrence.process.provenance(), options)
    return _plan(rules, Matcher(loaded.rules), options)


def _of_job(options: Options) -> Occurrence:
    """Return the first event of a job, as its record describes it."""
    from cnprocd.cli.event_from_options import occurrence_of
    from cnprocd.cli.verbs.jobs import find_job

    events = get_list(find_job(options, options.job), "events", as_dict)
    if not events:
        raise NotFoundError(f"job {options.job} has no event", "`cnprocctl jobs show` shows what is kept of it")
    return occurrence_of({name: value for name, value in events[0].items() if name not in ("status", "rule")}, ACCOUNTS)


def _reasons(found: list[Explained], sources: Mapping[str, str], options: Options) -> int:
    """Show the reasons per rule and key, and the provenance of the attributes of the process."""
    if options.json:
        print_json([{**_reasons_value(one), "sources": dict(sources)} for one in found])
        return EX_OK
    style = Style()
    for one in found:
        fires = one.match is not None
        only_log = " (only its log: the exit status is unknown)" if one.match and one.match.log_only else ""
        head = style("green", "fires") if fires else style("dim", "does not fire")
        print(f"{style('bold', one.compiled.name)} {head}{only_log}")
        width = max(len(reason.key) + 2 * reason.depth for reason in one.reasons)
        for reason in one.reasons:
            word, colour = _VERDICTS[reason.verdict]
            key = ("  " * reason.depth + reason.key).ljust(width)
            wanted = f"{reason.wanted}" if reason.wanted else ""
            actual = f"   is {reason.actual}" if reason.actual else ""
            print(f"    {style(colour, word.ljust(7))}  {key}  {wanted}{actual}")
    print(style("dim", "known from: " + ", ".join(f"{name} {source}" for name, source in sources.items())))
    return EX_OK


def _reasons_value(one: Explained) -> JsonDict:
    return {
        "rule": one.compiled.name,
        "fires": one.match is not None,
        "log_only": one.match is not None and one.match.log_only,
        "reasons": [
            {"depth": r.depth, "key": r.key, "wanted": r.wanted, "actual": r.actual, "verdict": _VERDICTS[r.verdict][0]}
            for r in one.reasons
        ],
    }


def prices(rules: Iterable[CompiledRule], matcher: Matcher, options: Options) -> list[RulePlan]:
    """Return the share of each rule in the plan, with the kernel's features as the daemon found them."""
    features, _ = _features(options)
    unwatched = frozenset(_unwatched(matcher))
    return [rule_plan(rule, features, unwatched) for rule in rules]


def _plan(rules: list[CompiledRule], matcher: Matcher, options: Options) -> int:
    features, known_from = _features(options)
    reasons = _unwatched(matcher)
    unwatched = frozenset(reasons)
    whole = whole_plan(make_plan(matcher, features, unwatched=unwatched), matcher, features, reasons)
    each = [rule_plan(rule, features, unwatched) for rule in rules]
    if options.json:
        print_json({"kernel_known_from": known_from, "plan": asdict(whole), "rules": [asdict(one) for one in each]})
        return EX_OK
    style = Style()
    for one in each:
        print(f"{style('bold', one.rule)}  cost {one.cost} of 4")
        print(f"    looks at   {', '.join(one.kinds)}{f' with {one.statuses}' if one.statuses else ''}")
        for label, text in zip(chain(["needs"], repeat("")), _needs(one) or ["no identity"], strict=False):
            print(f"    {label:10} {text}")
        print(f"    identity   {one.identity}: {one.identity_means}")
        print(f"    cost       {one.cost_means}")
    if options.rule is None:
        _show_whole(whole, known_from, style)
    return EX_OK


def _unwatched(matcher: Matcher) -> dict[str, str]:
    """Return the programs that rules name and that exit records do not identify on this machine, and why."""
    try:
        files = FileNames(look_up_here)
    except OSError:  # no inotify instance
        return {}
    files.use(matcher.exe_paths, None)
    return {one.path: one.reason for one in files.unwatched}


def _needs(rule: RulePlan) -> list[str]:
    """Return what a rule needs, each with its source and the lines that ask for it."""
    return [
        f"{need} from {_source(need, rule.prices[need])} ({', '.join(lines)})" for need, lines in rule.asked_by.items()
    ]


def _source(need: str, price: str) -> str:
    """Return where the daemon gets an attribute from."""
    if need == "oom":
        return "the kernel log"
    short = ", null for many processes that live less than a few ms" if need == "cmdline" and price == "table" else ""
    return f"{_PRICES[price]}{short}"


def _show_whole(whole: WholePlan, known_from: str, style: Style) -> None:
    features = ", ".join(name if has else f"no {name}" for name, has in whole.features.items())
    print(style("bold", "together"))
    print(f"    kernel     {features} ({known_from})")
    print(f"    mask       {whole.mask}: {' '.join(whole.mask_events)}")
    for name, program in (("connector", whole.connector_filter), ("taskstats", whole.taskstats_filter)):
        print(f"    BPF on {name}: {'' if program else 'none, everything passes'}")
        for line in program:
            print(f"        {line}")
    print(f"    records    {whole.exit_records or 'not requested'}")
    print(f"    table      {'kept' if whole.table else 'not needed'}; {_deaths(whole)}")
    if whole.kernel_log:
        print("    kernel log read to its end at exits by SIGKILL; costs nothing otherwise")
    for path, reason in whole.unwatched.items():
        print(f"    exe        {path} is known from the table only: {reason}")
    print(f"    loss       {whole.loss_accounting}")
    if whole.costliest_rules:
        print(f"    costliest  {', '.join(whole.costliest_rules)}")


def _deaths(whole: WholePlan) -> str:
    if whole.deaths_detected_by == "nothing":
        return "no rule asks for the end of processes"
    return f"deaths are detected by {whole.deaths_detected_by}"


def _features(options: Options) -> tuple[Features, str]:
    """Return the kernel features and their source: --without, the running daemon, or the assumption of all."""
    if getattr(options, "without", None):
        return _chosen({name: name not in options.without for name in FEATURES}), "as asked with --without"
    try:
        with Client(options.runtime_dir) as client:
            kernel = get_dict(client.ask("status"), "kernel")
        return _chosen({name: get_bool(kernel, name) for name in FEATURES}), "as the running daemon found it"
    except CnprocdError:
        return Features(), "assumed complete, because no daemon runs; see also --without"


def _chosen(has: Mapping[str, bool]) -> Features:
    return Features(event_mask=has["event_mask"], taskstats=has["taskstats"], socket_filter=has["socket_filter"])
