#!/usr/bin/env bash
# One budget of MACs spent in different ways: the same share of every layer, what scores or a probe say, whole branches
# or blocks, fewer tokens:
#
#     bash benchmarks/compare_budgets.sh digits 0 1 2 -- --epochs 10 --pruning_times 2
#
# MACS is the share of the dense model's MACs that is left (0.5), MERGE how many tokens a block merges (2).
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
budget=(--struct "${METHOD:-refill}" --vit_structured --target_macs "${MACS:-0.5}")
both=("${budget[@]}" --vit_prune_target both --ratio_allocation)
run uniform "${both[@]}" uniform
run global "${both[@]}" global
run sensitivity "${both[@]}" sensitivity
run branch "${budget[@]}" --vit_prune_target branch
run block "${budget[@]}" --vit_prune_target block
run all "${budget[@]}" --vit_prune_target all
run tokens "${both[@]}" uniform --token_merge "${MERGE:-2}"
compare
