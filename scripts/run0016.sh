#!/usr/bin/env bash
# CIFAR-10 (II), 32 bits, queries quantized too
flags=(
    --notes CifarII32bitsSymm --dataset CIFAR10 --protocol II --trainable_layer_num 2 --M 4 --feat_dim 48
    --T 0.35 --hp_beta 5e-3 --hp_lambda 0.1 --mode debias --pos_prior 0.1
    --queue_begin_epoch 15 --topK 1000 --symmetric_distance
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
