#!/usr/bin/env bash
# The example experiment: RSST on a ViT, 15 states of 120 epochs. Every setting is an environment variable, and
# arguments are passed on to the command, where the last one wins:
#
#     bash run_vit_rsst.sh
#     DATASET=cifar10 RATE=0.3 SEED=0 bash run_vit_rsst.sh --vit_structured --vit_prune_target both
#     NPROC=8 bash run_vit_rsst.sh                                     on eight GPUs of this machine
#
# The tests set MAIN to a small program that shows its arguments instead of training.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: [SETTING=VALUE ...] bash run_vit_rsst.sh [FLAG ...]

settings and their defaults
  ARCH=vit_tiny         DATASET=cifar100      STRUCT=rsst           CRITERIA=l1
  EPOCHS=120            BATCH_SIZE=128        LR=0.001              WARMUP=20
  DECREASING_LR=60,90   PRUNING_TIMES=15      RATE=0.15             RST_SCHEDULE=exp_custom_exponents
  REG=0.5               EXPONENTS=3           SEED=42               PRETRAINED=false
  SAVE_DIR=             (left to the program: results/<run name>)
  NPROC=1               processes, one for each GPU; more than one are started by torchrun
With other EPOCHS, warm-up and milestones that are not given scale with them.
FLAGs go to main_imp_fillback.py as they are and win; `python main_imp_fillback.py --help` lists them.
TEXT
}

epochs_changed=${EPOCHS:+yes}
for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit ;;
        --epochs | --epochs=*) epochs_changed=yes ;;
    esac
done

pretrained=${PRETRAINED:-false}
if [[ $pretrained != true && $pretrained != false ]]; then
    echo "run_vit_rsst.sh: PRETRAINED is '$pretrained', must be true or false" >&2
    exit 2
fi

if [[ ! ${NPROC:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "run_vit_rsst.sh: NPROC is '$NPROC', must be a whole number of at least 1" >&2
    exit 2
fi

command=(python)
# torchrun as a module, so that this environment's Python is the one that starts it
((${NPROC:-1} == 1)) || command+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
command+=(
    "${MAIN:-main_imp_fillback.py}"
    --dataset "${DATASET:-cifar100}" --arch "${ARCH:-vit_tiny}"
    --struct "${STRUCT:-rsst}" --criteria "${CRITERIA:-l1}"
    --epochs "${EPOCHS:-120}" --batch_size "${BATCH_SIZE:-128}" --lr "${LR:-0.001}"
)
# Warm-up 20 and milestones 60,90 belong to 120 epochs. With other epochs they are left out unless given by hand:
# the program then scales them.
warmup=${WARMUP:-} decreasing_lr=${DECREASING_LR:-}
if [[ -z $epochs_changed ]]; then
    warmup=${warmup:-20} decreasing_lr=${decreasing_lr:-60,90}
fi
[[ -z $warmup ]] || command+=(--warmup "$warmup")
[[ -z $decreasing_lr ]] || command+=(--decreasing_lr "$decreasing_lr")
command+=(--pruning_times "${PRUNING_TIMES:-15}" --rate "${RATE:-0.15}")
[[ $pretrained == false ]] || command+=(--pretrained)
command+=(
    --RST_schedule "${RST_SCHEDULE:-exp_custom_exponents}"
    --reg_granularity_prune "${REG:-0.5}" --exponents "${EXPONENTS:-3}" --seed "${SEED:-42}"
)
[[ -z ${SAVE_DIR:-} ]] || command+=(--save_dir "$SAVE_DIR")
command+=("$@")

# Waiting threads of PyTorch otherwise spin: with one other busy process a step took 5.2 s, with this 0.8 s.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# shellcheck source=/dev/null
source ./setup_env.sh

line=''
for word in "${command[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=$(printf '%q' "$word")
    line+="$word "
done
echo "${line% }"
exec "${command[@]}"
