#!/usr/bin/env bash
# Every criterion, for heads and neurons by Refill:
#
#     bash benchmarks/compare_criteria.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.5
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
for criterion in remain magnitude l1 l2 saliency random; do
    run "$criterion" --struct refill --vit_structured --vit_prune_target both --criteria "$criterion"
done
compare
