#!/usr/bin/env bash
# Starts one experiment in the background, with its log under launch_logs/:
#
#     bash launch_experiment.sh                                             the defaults, after a question
#     bash launch_experiment.sh cifar100 vit_small 60 1.0 4 true 0.3 y      a ViT-Small, no question
#     NPROC=8 bash launch_experiment.sh                                     on eight GPUs of this machine
#
# The tests set MAIN to a small program that shows its arguments instead of training, and LAUNCH_GRACE to the
# whole seconds that a started run is watched for an early end.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage_line='usage: launch_experiment.sh <dataset> <model> <epochs> <reg> <exp> <pretrained> <rate> <auto> <algorithm> <fillback>'

usage() {
    cat <<TEXT
$usage_line

Zero to ten arguments, in this order; missing ones take their default.
  dataset     cifar10 | cifar100 | fashionmnist | digits      cifar10
  model       vit_tiny | vit_small | vit_base                 vit_tiny
  epochs      epochs of each state                            80
  reg         strength of the penalty, >= 0                   1.0
  exp         exponent of its schedule, > 0                   4
  pretrained  true | false                                    true
  rate        fraction pruned in each step, in [0, 1)         0.2
  auto        y starts at once, n asks first                  n
  algorithm   rsst | refill | imp | dense                     rsst
  fillback    fraction given back, in [0, 1]; rsst, refill    0.2

The environment variable NPROC (1) is the number of processes, one for each GPU; torchrun starts more than one.
TEXT
}

refuse() {
    printf 'launch_experiment.sh: %s\n%s\n' "$1" "$usage_line" >&2
    exit 2
}

# one_of NAME VALUE CHOICE...
one_of() {
    local name=$1 value=$2 choice
    shift 2
    for choice in "$@"; do
        [[ $value != "$choice" ]] || return 0
    done
    refuse "$name is '$value', must be one of: $*"
}

# number NAME VALUE CONDITION WORDS: CONDITION is awk's, on v
number() {
    local decimal='^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$'
    if [[ ! $2 =~ $decimal ]] || ! LC_ALL=C awk -v v="$2" "BEGIN { v += 0; exit !(v < 1e300 && $3) }"; then
        refuse "$1 is '$2', must be a number $4"
    fi
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit ;;
    esac
done
(($# <= 10)) || refuse "$# arguments, the eleventh is '${11}': there are ten at most"

# Without the colon: an empty argument is a wrong value, not a missing one.
dataset=${1-cifar10} model=${2-vit_tiny} epochs=${3-80} reg=${4-1.0} exp=${5-4}
pretrained=${6-true} rate=${7-0.2} auto=${8-n} algorithm=${9-rsst} fillback=${10-0.2}

one_of dataset "$dataset" cifar10 cifar100 fashionmnist digits
one_of model "$model" vit_tiny vit_small vit_base
[[ $epochs =~ ^[1-9][0-9]*$ ]] || refuse "epochs is '$epochs', must be a whole number of at least 1"
number reg "$reg" 'v >= 0' 'of at least 0'
number exp "$exp" 'v > 0' 'above 0'
one_of pretrained "$pretrained" true false
number rate "$rate" 'v < 1' 'in [0, 1)'
one_of auto "$auto" y n
one_of algorithm "$algorithm" rsst refill imp dense
number fillback "$fillback" 'v <= 1' 'in [0, 1]'
[[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NPROC is '$NPROC', must be a whole number of at least 1"
[[ $auto == y || -t 0 ]] || refuse "auto is 'n' and there is no terminal to ask on: set auto (the eighth) to y"

command=(python)
# torchrun as a module, so that this environment's Python is the one that starts it
((${NPROC:-1} == 1)) || command+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
command+=(
    "${MAIN:-main_imp_fillback.py}"
    --dataset "$dataset" --arch "$model" --struct "$algorithm" --epochs "$epochs" --rate "$rate"
)
[[ $pretrained == false || $model == vit_tiny ]] || command+=(--pretrained)
command+=(--RST_schedule exp_custom_exponents --reg_granularity_prune "$reg" --exponents "$exp")
# Nothing comes back in imp and dense.
[[ $algorithm != rsst && $algorithm != refill ]] || command+=(--fillback_rate "$fillback")

for name in dataset model epochs reg exp pretrained rate auto algorithm fillback; do
    printf '%-12s%s\n' "$name" "${!name}"
done
if [[ $pretrained == true && $model == vit_tiny ]]; then
    echo 'note: vit_tiny has no public weights; it trains from scratch'
fi
line=''
for word in "${command[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=$(printf '%q' "$word")
    line+="$word "
done
printf '%-12s%s\n' command "${line% }"

if [[ $auto == n ]]; then
    answer=''
    read -r -p 'Start? [y/N] ' answer || echo
    if [[ ! $answer =~ ^([yY]|[yY]es)$ ]]; then
        echo 'not started'
        exit 1
    fi
fi

# Waiting threads of PyTorch otherwise spin: with one other busy process a step took 5.2 s, with this 0.8 s.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# shellcheck source=/dev/null
source ./setup_env.sh

mkdir -p launch_logs
stem=launch_logs/${dataset}_${model}_${algorithm}_$(date +%Y%m%d_%H%M%S)
log=$stem.log
# noclobber: of two runs started within one second each gets its own log.
for ((number = 2; ; number++)); do
    (set -o noclobber && : >"$log") 2>/dev/null && break
    if [[ ! -e $log ]]; then
        echo "launch_experiment.sh: cannot write $log" >&2
        exit 1
    fi
    log=${stem}_$number.log
done

# A session of its own outlives this terminal; macOS has no setsid, nohup alone does there.
detach=(nohup)
! command -v setsid >/dev/null || detach=(setsid nohup)
PYTHONUNBUFFERED=1 "${detach[@]}" "${command[@]}" >"$log" 2>&1 </dev/null &
process=$!

SECONDS=0
while kill -0 "$process" 2>/dev/null && ((SECONDS < ${LAUNCH_GRACE:-2})); do sleep 0.1; done
if ! kill -0 "$process" 2>/dev/null; then
    status=0
    wait "$process" || status=$?
    last=$(tail -n 1 "$log")
    if ((status != 0)); then
        echo "launch_experiment.sh: the run ended at once with status $status; $log ends with: $last" >&2
        exit 1
    fi
    echo "finished already: $log ends with: $last"
    exit 0
fi
cat <<TEXT
process     $process
log         $PWD/$log
follow      tail -f $(printf '%q' "$PWD/$log")
stop        kill $process
TEXT
