#!/usr/bin/env bash
# What each part of a training recipe does for a dense network: the defaults, two steps to a base, and the base with one
# part more each, and with all of them:
#
#     bash benchmarks/compare_recipes.sh digits 0 1 2 -- --epochs 20
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
dense=(--struct dense --pruning_times 1)
run defaults "${dense[@]}"
adamw=("${dense[@]}" --batch_size 32 --opt adamw --lr 0.0005 --weight_decay 0.05)
run adamw "${adamw[@]}"
base=("${adamw[@]}" --sched cosine --min_lr 1e-5)
run base "${base[@]}"
run base_no_aug "${base[@]}" --aug none
run base_smoothing "${base[@]}" --label_smoothing 0.1
run base_rand "${base[@]}" --aug rand
run base_mix "${base[@]}" --mixup 0.2 --cutmix 1
run base_drop_path "${base[@]}" --drop_path 0.1
run base_ema "${base[@]}" --ema_decay 0.99
run base_all "${base[@]}" --label_smoothing 0.1 --aug rand --mixup 0.2 --cutmix 1 --drop_path 0.1 --ema_decay 0.99
compare
