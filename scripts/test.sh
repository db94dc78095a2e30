#!/usr/bin/env bash
# Checks the style and runs the tests; further arguments are passed on to pytest. --all: many more kills and damaged files.
# --mutants: changes the code in many small ways, each of which some test must notice (half an hour at most); further
# arguments are those of tests/mutants.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt

if [[ "${1:-}" == --mutants ]]; then
    exec "$python" tests/mutants.py "${@:2}"
fi
if [[ "${1:-}" == --all ]]; then
    export MECOQ_ALL=1
    shift
fi
style=0
"$python" -m ruff check . && "$python" -m ruff format --check . || style=$?
"$python" -m pytest --numprocesses auto --dist loadfile "$@"  # a core each, a file's tests together
exit "$style"
