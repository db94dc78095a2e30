#!/usr/bin/env bash
# CIFAR-10 (I), 64 bits, queries quantized too
flags=(
    --notes CifarI64bitsSymm --dataset CIFAR10 --protocol I --trainable_layer_num 2 --M 8 --feat_dim 128
    --T 0.4 --hp_beta 1e-3 --hp_lambda 0.05 --mode debias --pos_prior 0.1
    --queue_begin_epoch 3 --topK 1000 --symmetric_distance
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
