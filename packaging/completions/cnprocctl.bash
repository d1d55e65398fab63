# bash completion for cnprocctl; made by packaging/manual.py.
_cnprocctl_rules() { cnprocctl rules list 2>/dev/null | awk "NR > 1 { print \$1 }"; }
_cnprocctl_jobs() { cnprocctl jobs list -n 200 ${1:+--state $1} 2>/dev/null | awk "NR > 1 && \$1 + 0 { print \$1 }"; }
_cnprocctl() {
    local cur prev verb help word i
    cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb="" help=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case "$word" in
            --after|--ancestor|--by|--cgroup|--cmdline|--comm|--container|--count|--cpu-time|--draft|--euid|--event|--exe|--exe-claimed|--exit-code|--for|--group|--hash|--host|--interval|--job|--kind|--kinds|--lifetime|--limit|--lines|--loginuid|--match|--max-rss|--max-size|--output|--parent|--pid|--pod-uid|--rate|--rule|--rules|--runtime-dir|--signal|--since|--state|--state-dir|--status|--unit|--until|--user|--user-unit|--without|-H|-n|-o) ((i++)) ;;
            -*) ;;
            *) if [[ -z $verb && $word == help ]]; then help=yes; elif [[ -z $verb ]]; then verb=$word; elif [[ " rules jobs " == *" $verb "* ]]; then verb="$verb $word"; fi ;;
        esac
    done
    case "$prev" in
        --after) COMPREPLY=(); return ;;
        --ancestor) COMPREPLY=(); return ;;
        --by) COMPREPLY=($(compgen -W "comm unit user" -- "$cur")); return ;;
        --cgroup) COMPREPLY=(); return ;;
        --cmdline) COMPREPLY=(); return ;;
        --comm) COMPREPLY=(); return ;;
        --container) COMPREPLY=(); return ;;
        --count) COMPREPLY=(); return ;;
        --cpu-time) COMPREPLY=(); return ;;
        --draft) COMPREPLY=(); return ;;
        --euid) COMPREPLY=(); return ;;
        --event) COMPREPLY=(); return ;;
        --exe) COMPREPLY=(); return ;;
        --exe-claimed) COMPREPLY=(); return ;;
        --exit-code) COMPREPLY=(); return ;;
        --for) COMPREPLY=(); return ;;
        --group) COMPREPLY=($(compgen -g -- "$cur")); return ;;
        --hash) COMPREPLY=(); return ;;
        --host) COMPREPLY=(); return ;;
        --interval) COMPREPLY=(); return ;;
        --job) COMPREPLY=($(compgen -W "$(_cnprocctl_jobs)" -- "$cur")); return ;;
        --kind) COMPREPLY=($(compgen -W "exit nonzero_exit fork exec uid gid sid ptrace comm coredump" -- "$cur")); return ;;
        --kinds) COMPREPLY=(); return ;;
        --lifetime) COMPREPLY=(); return ;;
        --limit) COMPREPLY=(); return ;;
        --lines) COMPREPLY=(); return ;;
        --loginuid) COMPREPLY=(); return ;;
        --match) COMPREPLY=(); return ;;
        --max-rss) COMPREPLY=(); return ;;
        --max-size) COMPREPLY=(); return ;;
        --output) COMPREPLY=($(compgen -W "table json" -- "$cur")); return ;;
        --parent) COMPREPLY=(); return ;;
        --pid) COMPREPLY=(); return ;;
        --pod-uid) COMPREPLY=(); return ;;
        --rate) COMPREPLY=(); return ;;
        --rule) COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur")); return ;;
        --rules) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        --runtime-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
        --signal) COMPREPLY=($(compgen -W "SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV SIGUSR2 SIGPIPE SIGALRM SIGTERM SIGSTKFLT SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGXCPU SIGXFSZ SIGVTALRM SIGPROF SIGWINCH SIGIO SIGPWR SIGSYS" -- "$cur")); return ;;
        --since) COMPREPLY=(); return ;;
        --state) COMPREPLY=($(compgen -W "waiting running done dead" -- "$cur")); return ;;
        --state-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
        --status) COMPREPLY=(); return ;;
        --unit) COMPREPLY=(); return ;;
        --until) COMPREPLY=(); return ;;
        --user) COMPREPLY=($(compgen -u -- "$cur")); return ;;
        --user-unit) COMPREPLY=(); return ;;
        --without) COMPREPLY=($(compgen -W "event_mask taskstats socket_filter" -- "$cur")); return ;;
        -H) COMPREPLY=(); return ;;
        -n) COMPREPLY=(); return ;;
        -o) COMPREPLY=($(compgen -W "table json" -- "$cur")); return ;;
    esac
    if [[ -n $help && -n $verb && " rules jobs " != *" $verb "* ]]; then COMPREPLY=(); return; fi
    case "$verb" in
        "") COMPREPLY=($(compgen -W "status reload check explain test schema rules jobs history watch top metrics doctor record replay help --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur")) ;;
        rules) COMPREPLY=($(compgen -W "list show enable disable read write" -- "$cur")) ;;
        jobs) COMPREPLY=($(compgen -W "list show log retry drop kill" -- "$cur")) ;;
        "status")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "reload")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "check")
            COMPREPLY=($(compgen -W "--strict --other-host --observe-only --draft --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
            ;;
        "explain")
            COMPREPLY=($(compgen -W "--job --without --draft --pid --kind --comm --exit-code --signal --status --core --oom-killed --lost --user --euid --loginuid --group --exe --exe-claimed --cmdline --unit --user-unit --container --pod-uid --cgroup --parent --ancestor --lifetime --max-rss --cpu-time --from-hook --thread --event --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur"))
            ;;
        "test")
            COMPREPLY=($(compgen -W "--draft --pid --kind --comm --exit-code --signal --status --core --oom-killed --lost --user --euid --loginuid --group --exe --exe-claimed --cmdline --unit --user-unit --container --pod-uid --cgroup --parent --ancestor --lifetime --max-rss --cpu-time --from-hook --thread --event --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "schema")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "rules list")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "rules show")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur"))
            ;;
        "rules enable")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur"))
            ;;
        "rules disable")
            COMPREPLY=($(compgen -W "--for --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_rules)" -- "$cur"))
            ;;
        "rules read")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
            ;;
        "rules write")
            COMPREPLY=($(compgen -W "--hash --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
            ;;
        "jobs list")
            COMPREPLY=($(compgen -W "--state --rule -n --limit --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "jobs show")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_jobs)" -- "$cur"))
            ;;
        "jobs log")
            COMPREPLY=($(compgen -W "-f --follow --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_jobs)" -- "$cur"))
            ;;
        "jobs retry")
            COMPREPLY=($(compgen -W "--rule --all --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_jobs dead)" -- "$cur"))
            ;;
        "jobs drop")
            COMPREPLY=($(compgen -W "--rule --all --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_jobs waiting)" -- "$cur"))
            ;;
        "jobs kill")
            COMPREPLY=($(compgen -W "--retry --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -W "$(_cnprocctl_jobs running)" -- "$cur"))
            ;;
        "history")
            COMPREPLY=($(compgen -W "--rule --comm --pid --user --unit --since --until -n --limit --after -f --follow --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "watch")
            COMPREPLY=($(compgen -W "--events --kinds --rule --match --rate --after -n --count --for --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "top")
            COMPREPLY=($(compgen -W "--by --interval -n --lines --for --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "metrics")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "doctor")
            COMPREPLY=($(compgen -W "--rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            ;;
        "record")
            COMPREPLY=($(compgen -W "--hold --for --max-size --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
            ;;
        "replay")
            COMPREPLY=($(compgen -W "--history --rule -n --limit --draft --rules --runtime-dir --state-dir -o --output --json -H --host --until-eof" -- "$cur"))
            [[ $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
            ;;
    esac
}
complete -F _cnprocctl cnprocctl
