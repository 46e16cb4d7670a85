#!/usr/bin/env bash
# Dense, IMP, Refill and RSST with the same epochs, element-wise:
#
#     bash benchmarks/compare_methods.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.3
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
for method in dense imp refill rsst; do
    run "$method" --struct "$method"
done
compare
