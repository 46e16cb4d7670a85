#!/usr/bin/env bash
# A Vision Transformer beside a convolutional network, by Refill and by RSST:
#
#     bash benchmarks/vit_vs_cnn.sh digits 0 1 2 -- --epochs 10 --pruning_times 4 --rate 0.3
#
# ViTs lose heads and neurons, the CNN filters.
# shellcheck source=benchmarks/compare.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/compare.sh"
for method in refill rsst; do
    run "vit_tiny_$method" --arch vit_tiny --struct "$method" --vit_structured --vit_prune_target both
    run "res20s_$method" --arch res20s --struct "$method"
done
compare
