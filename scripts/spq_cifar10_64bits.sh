#!/usr/bin/env bash
# SPQ on CIFAR-10, its official split, 64 bits, from scratch
flags=(
    --notes SPQ-Cifar64bits --method SPQ --dataset CIFAR10 --protocol official --M 16 --K 16 --L 16
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
