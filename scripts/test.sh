#!/usr/bin/env bash
# Checks the style and runs the tests; further arguments are passed on to pytest.
#   --all      all of them, with hundreds of kills and damaged files
#   --hostile  only those of kills, damaged files, full disks, strange flags and images, by the hundred
#   --mutants  changes the code in many small ways, each of which some test must notice; further arguments are those of
#              tests/mutants.py
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt

tests=(tests)
case "${1:-}" in
    --mutants) exec "$python" tests/mutants.py "${@:2}" ;;
    --all) export MECOQ_HOSTILE=1 && shift ;;
    --hostile)
        export MECOQ_HOSTILE=1
        tests=(tests/test_faults.py tests/test_hostile.py)
        shift
        ;;
esac
style=0
"$python" -m ruff check . && "$python" -m ruff format --check . || style=$?
"$python" -m pytest --numprocesses auto --dist loadfile "${tests[@]}" "$@" # a core each, a file's tests together
exit "$style"
