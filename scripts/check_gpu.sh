#!/usr/bin/env bash
# Checks a machine before anything else runs there: numbers, waiting, speed, in at most ten minutes.
#   bash scripts/check_gpu.sh                     # GPU 0
#   bash scripts/check_gpu.sh 1 --results runs/check1
#   bash scripts/check_gpu.sh cpu                 # a smaller version
# It needs neither a network nor data; what cannot run is skipped, and the table says why.
set -euo pipefail
device=${1-0}
case "$device" in
    cpu) shift ;;
    -*) device=cuda:0 ;;
    "" | *[!0-9]*)
        echo "error: usage: bash $0 [DEVICE] [flags], DEVICE a GPU's number (0) or cpu" >&2
        exit 2
        ;;
    *)
        device=cuda:$device
        shift $(($# > 0))
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
missing=$("$python" -c 'from importlib.util import find_spec as find
print(*[name for name in ("torch", "torchvision", "numpy", "PIL", "tqdm") if find(name) is None])')
if [ -n "$missing" ]; then
    echo "error: $python has no $missing: pip install -r requirements.txt" >&2
    exit 2
fi
if ! "$python" -c 'import torchvision' 2>/dev/null; then
    echo "error: $python cannot import torch and torchvision, which must be a matching pair: pip install -r requirements.txt" >&2
    exit 2
fi
export KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-5} # of PyTorch's profiler: nothing but what is fatal
exec "$python" -m experiments.check_gpu --device "$device" "$@"
