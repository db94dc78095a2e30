#!/usr/bin/env bash
# Checks the style and runs the tests; further arguments are passed on to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt

style=0
"$python" -m ruff check . && "$python" -m ruff format --check . || style=$?
"$python" -m pytest "$@"
exit "$style"
