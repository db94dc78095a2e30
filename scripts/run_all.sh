#!/usr/bin/env bash
# Runs a list of the scripts on a list of GPUs, one after the other on each; a GPU that is free takes the next of the list.
#   bash scripts/run_all.sh 0,1,2,3 1-24
#   bash scripts/run_all.sh 0,0,1 7,9,13-18 --recipe release --output runs/release    # two at a time on GPU 0
# Further flags go to every run. What is finished with the same flags is skipped; the exit code is 1 if one failed.
set -euo pipefail
usage="error: usage: bash $0 GPUS SCRIPTS [flags of main.py], e.g. bash $0 0,1 1-6,9 (GPUS may be cpu)"
[[ "${1:-}" =~ ^(cpu|[0-9]+)(,(cpu|[0-9]+))*$ && "${2:-}" =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$ ]] || {
    echo "$usage" >&2
    exit 2
}
IFS=, read -ra gpus <<<"$1"
IFS=, read -ra ranges <<<"$2"
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
MECOQ_PYTHON=$python
[[ "$python" != .venv/* ]] || MECOQ_PYTHON=$PWD/$python
export MECOQ_PYTHON

scripts=()
for range in "${ranges[@]}"; do
    for ((number = 10#${range%-*}; number <= 10#${range#*-}; number++)); do
        script=$(printf 'scripts/run%04d.sh' "$number")
        [ -f "$script" ] || { echo "error: there is no $script" >&2; exit 2; }
        scripts+=("$script")
    done
done

queue=$(mktemp -d) # run0001.sh there: taken; run0001.sh.failed: failed
work() {
    local gpu=$1 script name code
    for script in "${scripts[@]}"; do
        name=$(basename "$script")
        mkdir "$queue/$name" 2>/dev/null || continue
        echo "$(date '+%F %T') $gpu: $name"
        code=0
        bash "$script" "$gpu" --skip_finished "${@:2}" >/dev/null 2> >(sed "s/^/$name: /" >&2) || code=$?
        echo "$(date '+%F %T') $gpu: $name ended with exit code $code"
        [ "$code" = 0 ] || touch "$queue/$name.failed"
    done
}
set -m # a process group for each worker, so that an interrupt ends its run too
workers=()
trap 'for worker in "${workers[@]}"; do kill -INT -- "-$worker" 2>/dev/null || true; done; wait; rm -r "$queue"; exit 130' INT TERM
for gpu in "${gpus[@]}"; do
    work "$gpu" "$@" &
    workers+=($!)
done
wait
failed=$(cd "$queue" && ls -d -- *.failed 2>/dev/null | tr '\n' ' ' | sed 's/\.failed//g') || true
rm -r "$queue"
[ -z "$failed" ] || { echo "failed: $failed" >&2; exit 1; }
