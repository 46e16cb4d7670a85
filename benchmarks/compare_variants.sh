#!/usr/bin/env bash
# RSST on single weights, heads, neurons, or heads and neurons:
#
#     bash benchmarks/compare_variants.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.34
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
