#!/usr/bin/env bash
# CIBHash on CIFAR-10, 16 bits, on frozen VGG16 features; --recipe release has its released split
flags=(
    --notes CIBHash-Cifar16bits --method CIBHash --dataset CIFAR10 --code_length 16
)
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
