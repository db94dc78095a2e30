#!/usr/bin/env bash
# CIFAR-10 (II), 16 bits, queries quantized too
flags=(
    --notes CifarII16bitsSymm --dataset CIFAR10 --protocol II --trainable_layer_num 2 --M 2 --feat_dim 16
    --T 0.35 --hp_beta 1e-2 --hp_lambda 0.01 --mode debias --pos_prior 0.1
    --queue_begin_epoch 15 --topK 1000 --symmetric_distance
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
