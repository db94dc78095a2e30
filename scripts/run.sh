# Sourced by run0001.sh ... run0024.sh, spq_*.sh and cibhash_*.sh, which leave their flags in $flags: starts main.py with
# them. The first argument is the device, a GPU's number or cpu; all further ones are flags of main.py, and win. Paths
# count from the top folder.
set -euo pipefail
case "${1:-}" in
    cpu) device=cpu ;;
    "" | *[!0-9]*)
        echo "error: usage: bash $0 DEVICE [flags of main.py], DEVICE a GPU's number (0) or cpu" >&2
        exit 2
        ;;
    *) device=cuda:$1 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
exec "$python" main.py --device "$device" "${flags[@]}" "${@:2}"
