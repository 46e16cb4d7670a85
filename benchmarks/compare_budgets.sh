#!/usr/bin/env bash
# One budget of MACs spent in different ways: the same share of every layer, what scores or a probe say, whole branches
# or blocks, fewer tokens:
#
#     bash benchmarks/compare_budgets.sh digits 0 1 2 -- --epochs 10 --pruning_times 2
#
# MACS is the share of the dense model's MACs that is left (0.5), DEPTH that of blocks, or branches, that go (0.5),
# MERGE how many tokens a block merges (2).
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
units=(--struct "${METHOD:-refill}" --vit_structured --vit_prune_target)
for allocation in uniform global sensitivity; do
    run "$allocation" "${units[@]}" both --target_macs "${MACS:-0.5}" --ratio_allocation "$allocation"
done
run all "${units[@]}" all --target_macs "${MACS:-0.5}"
for target in branch block; do
    run "$target" "${units[@]}" "$target" --rate "${DEPTH:-0.5}"
done
run tokens "${units[@]}" both --target_macs "${MACS:-0.5}" --ratio_allocation uniform --token_merge "${MERGE:-2}"
compare
