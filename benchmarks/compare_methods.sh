#!/usr/bin/env bash
# Single weights: dense, IMP, Refill and RSST with the same epochs:
#
#     bash benchmarks/compare_methods.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.3
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
