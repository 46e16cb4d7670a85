#!/usr/bin/env bash
# Every criterion, for heads and neurons by Refill:
#
#     bash benchmarks/compare_criteria.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.5
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
