#!/usr/bin/env bash
# Half of the single weights by IMP and by RSST: the smallest of all layers, or two of every four consecutive ones:
#
#     bash benchmarks/compare_nm.sh digits 0 1 2 -- --epochs 10
#
# Both have three states; two prunings by a rate of 1 - sqrt(1/2) leave half of the weights.
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
for method in imp rsst; do
    run "${method}_global" --struct "$method" --pruning_times 3 --rate 0.29289322
    run "${method}_2-4" --struct "$method" --pruning_times 3 --nm 2:4
done
compare
