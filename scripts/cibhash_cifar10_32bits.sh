#!/usr/bin/env bash
# CIBHash on CIFAR-10, 32 bits, on frozen VGG16 features; --recipe release has its released split
flags=(
    --notes CIBHash-Cifar32bits --method CIBHash --dataset CIFAR10 --code_length 32
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
