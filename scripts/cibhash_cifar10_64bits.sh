#!/usr/bin/env bash
# CIBHash on CIFAR-10, 64 bits, on frozen VGG16 features; --recipe release has its released split
flags=(
    --notes CIBHash-Cifar64bits --method CIBHash --dataset CIFAR10 --code_length 64
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
