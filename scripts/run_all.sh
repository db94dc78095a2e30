#!/usr/bin/env bash
# Runs a list of the scripts on a list of GPUs, one after the other on each; a GPU that is free takes the next of the list.
#   bash scripts/run_all.sh 0,1,2,3 1-24
#   bash scripts/run_all.sh 0,0,1 7,9,13-18 --recipe release --output runs/release    # two at a time on GPU 0
# Further flags go to every run; --dry_run checks them and says what would run. What is finished with the same flags is
# skipped, what was stopped goes on; the exit code is 1 if one failed.
set -euo pipefail
refuse() {
    echo "error: $1" >&2
    exit 2
}
[[ "${1:-}" =~ ^(cpu|[0-9]+)(,(cpu|[0-9]+))*$ && "${2:-}" =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$ ]] ||
    refuse "usage: bash $0 GPUS SCRIPTS [flags of main.py], e.g. bash $0 0,1 1-6,9 (GPUS may be cpu)"
IFS=, read -ra gpus <<<"$1"
IFS=, read -ra ranges <<<"$2"
shift 2
dry=
for flag in "$@"; do
    [ "$flag" != --dry_run ] || dry=1
    [[ "$flag" != --notes && "$flag" != --notes=* ]] || refuse "--notes: every run has its own; name another --output"
    [[ "$flag" != --help && "$flag" != -h ]] || refuse "$flag: give it to a single script"
done
scripts=()
for range in "${ranges[@]}"; do
    ((10#${range%-*} <= 10#${range#*-})) || refuse "$range: the first number is the larger one"
    for ((number = 10#${range%-*}; number <= 10#${range#*-}; number++)); do
        name=$(printf 'run%04d.sh' "$number")
        [ -f "$(dirname "${BASH_SOURCE[0]}")/$name" ] || refuse "there is no $name"
        scripts+=("$name")
    done
done
[ "${#scripts[@]}" -gt 0 ] || refuse "there is no script in ${ranges[*]}"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
[[ "$python" != .venv/* ]] || python=$PWD/$python
export MECOQ_PYTHON=$python
if [ -n "$dry" ]; then
    bash "scripts/${scripts[0]}" "${gpus[0]}" "$@" >/dev/null # are the flags sound?
    printf '%s\n' "would run on ${gpus[*]}: ${scripts[*]}"
    exit 0
fi

queue=$(mktemp -d) # a folder run0001.sh: taken; run0001.sh/done: finished
work() {
    local gpu=$1 name
    trap 'exit 130' INT TERM HUP # bash would go on with the next
    for name in "${scripts[@]}"; do
        mkdir "$queue/$name" 2>/dev/null || continue
        echo "$(date '+%F %T') $gpu: $name"
        if bash "scripts/$name" "$gpu" --resume "${@:2}" 2>&1 >/dev/null |
            (trap '' INT TERM HUP && exec sed "s/^/$name: /" >&2); then # it outlives the run, whose last word it passes on
            touch "$queue/$name/done"
            echo "$(date '+%F %T') $gpu: $name is finished"
        else
            echo "$(date '+%F %T') $gpu: $name failed"
        fi
    done
}
set -m # a process group for each worker, so that an interrupt ends its run too
workers=()
stop() {
    trap '' INT TERM HUP
    for worker in "${workers[@]}"; do kill -TERM -- "-$worker" 2>/dev/null || true; done
    wait
    rm -r "$queue"
    exit 130
}
trap stop INT TERM HUP
for gpu in "${gpus[@]}"; do
    work "$gpu" "$@" &
    workers+=($!)
done
wait
failed=()
for name in "${scripts[@]}"; do
    [ -e "$queue/$name/done" ] || failed+=("$name")
done
rm -r "$queue"
[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
