#!/usr/bin/env bash
# Heads and neurons by Refill and by RSST, 50% and 70% gone, without a teacher and taught by the dense network of state 0:
#
#     bash benchmarks/compare_distillation.sh digits 0 1 2 -- --epochs 10 --pruning_times 2
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
for ratio in 0.5 0.7; do
    for method in refill rsst; do
        units=(--struct "$method" --vit_structured --vit_prune_target both --sorting_mode global --rate "$ratio")
        run "${method}_$ratio" "${units[@]}"
        run "${method}_${ratio}_taught" "${units[@]}" --teacher self
    done
done
compare
