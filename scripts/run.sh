# Sourced by run0001.sh ... run0024.sh, spq_*.sh and cibhash_*.sh, which leave their flags in $flags: starts main.py with
# them. The first argument is the device, a GPU's number or cpu, or several GPUs that share the run, say 0,1,2,3; all
# further ones are flags of main.py, and win. Paths count from the top folder.
set -euo pipefail
gpus=()
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    device=cuda:$1
elif [[ "${1:-}" =~ ^[0-9]+(,[0-9]+)+$ ]]; then
    device=cuda
    IFS=, read -ra gpus <<<"$1"
    [ -z "$(printf '%s\n' "${gpus[@]}" | sort -n | uniq -d)" ] || { echo "error: $1 names a GPU twice" >&2 && exit 2; }
elif [ "${1:-}" = cpu ]; then
    device=cpu
else
    echo "error: usage: bash $0 DEVICE [flags of main.py], DEVICE a GPU's number (0), several (0,1,2,3) or cpu" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" requirements.txt
command=(main.py --device "$device" "${flags[@]}" "${@:2}")
[[ "${#gpus[@]}" -gt 0 && " $* " != *" --dry_run "* ]] || exec "$python" "${command[@]}"
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # a scheduler's: numbers count within it
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    for i in "${!gpus[@]}"; do
        [ "${gpus[i]}" -lt "${#visible[@]}" ] ||
            { echo "error: GPU ${gpus[i]}: CUDA_VISIBLE_DEVICES has ${#visible[@]}, counted from 0" >&2 && exit 2; }
        gpus[i]=${visible[${gpus[i]}]}
    done
fi
CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]}")
export CUDA_VISIBLE_DEVICES
exec "$python" scripts/launch.py --standalone --nproc_per_node "${#gpus[@]}" "${command[@]}"
