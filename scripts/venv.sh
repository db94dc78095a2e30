# Sourced by the scripts beside it, with the requirement files to install: goes to the top folder, makes .venv if there is
# no sound one, installs what is missing, and leaves its interpreter's path in $python. MECOQ_PYTHON names the
# interpreter of an environment of your own, which is then used as it is.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${MECOQ_PYTHON:-.venv/bin/python}
if [ -z "${MECOQ_PYTHON:-}" ]; then
    wanted=$(cat requirements*.txt)
    for file in "$@"; do # a file is installed once, and again when the requirements have changed
        if ! [ -x "$python" ] || [ "$wanted" != "$(cat ".venv/installed-$file" 2>/dev/null)" ]; then
            if ! "$python" -m pip --version >/dev/null 2>&1; then
                echo "Making .venv and installing into it: about 5 GB with PyTorch's GPU libraries, a few minutes the first time." >&2
                if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
                    echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3 before the command" >&2
                    exit 2
                fi
                "${PYTHON:-python3}" -m venv .venv
            fi
            if ! "$python" -m pip install --quiet --disable-pip-version-check --requirement="$file"; then
                echo "error: $file could not be installed; to use an environment of your own, give MECOQ_PYTHON=/path/to/python before the command" >&2
                exit 2
            fi
            printf '%s\n' "$wanted" >".venv/installed-$file"
        fi
    done
fi
