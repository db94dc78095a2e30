#!/usr/bin/env bash
# SPQ on CIFAR-10, its official split, 32 bits, from scratch
flags=(
    --notes SPQ-Cifar32bits --method SPQ --dataset CIFAR10 --protocol official --M 8 --K 16 --L 16
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
