#!/usr/bin/env bash
# SPQ on CIFAR-10, its official split, 16 bits, from scratch
flags=(
    --notes SPQ-Cifar16bits --method SPQ --dataset CIFAR10 --protocol official --M 4 --K 16 --L 16
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
