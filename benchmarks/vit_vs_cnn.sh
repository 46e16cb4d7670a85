#!/usr/bin/env bash
# A Vision Transformer and a convolutional network, by Refill and by RSST:
#
#     bash benchmarks/vit_vs_cnn.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.3
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
