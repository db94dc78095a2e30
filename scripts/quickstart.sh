#!/usr/bin/env bash
# Trains 32-bit MeCoQ from scratch on 1,497 handwritten digits, without a label, in minutes on two CPU cores.
# Says how well 300 others are found, before and after. Further arguments are flags of main.py, say --dry_run.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt

flags=(--dataset Digits --backbone convnet --image_size 32 --M 4 --feat_dim 64 --T 0.3 --mode debias --pos_prior 0.1
    --lr 0.05 --topK 100)
"$python" main.py "${flags[@]}" --epoch_num 0 --notes quickstart-untrained --disable_writer --resume "$@"
"$python" main.py --epoch_num 15 --queue_begin_epoch 5 "${flags[@]}" --notes quickstart --resume "$@"
for flag in "$@"; do [ "$flag" != --dry_run ] || exit 0; done
"$python" - <<'PY'
import json

untrained, trained = (
    json.load(open(f"checkpoints/{name}/metrics.json"))["map"] for name in ("quickstart-untrained", "quickstart")
)
print(f"""
MAP@100 with 4 bytes per image: {untrained:.3f} before training, {trained:.3f} after.
  checkpoints/quickstart/    the model, the database's codes, the metrics and curves
  logs/quickstart.log        what was printed above
  logs/quickstart/           curves: .venv/bin/tensorboard --logdir logs""")
PY
