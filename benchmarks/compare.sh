# Sourced by the compare_*.sh beside it: a loop over the one command, and report.py's tables at the end.
#
#     DATASET SEED... [-- FLAG...]
#
# {seed} in a FLAG stands for the seed, as in: -- --init results/dense_s{seed}/model/model.safetensors
# A run whose folder is complete is skipped, one that was broken off goes on. OUT names the folder of all runs.
# shellcheck shell=bash
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

script=$(basename -- "$0" .sh)
usage="usage: [OUT=DIR] bash benchmarks/$script.sh DATASET SEED... [-- FLAG...]"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    echo "FLAGs go to every run, as in: -- --data /usr/share/datasets/fashion-mnist --epochs 10 --pruning_times 4"
    exit
fi
if [[ ! ${2:-} =~ ^[0-9]+$ || $1 == -* ]]; then # no seed, or no data set
    echo "$usage" >&2
    exit 2
fi
dataset=$1 seeds=() flags=()
shift
while (($#)); do
    if [[ $1 == -- ]]; then
        shift
        flags=("$@")
        break
    fi
    if [[ ! $1 =~ ^[0-9]+$ ]]; then
        echo "$script.sh: seed '$1' is not a number; flags come after --" >&2
        exit 2
    fi
    seeds+=("$1")
    shift
done
out=${OUT:-results/${script}_$dataset}
runs=()

# Waiting threads of PyTorch otherwise spin: beside one busy process a step took 5.2 s, with this 0.8 s.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# shellcheck source=/dev/null
source ./setup_env.sh

run() { # run NAME FLAG...: one run per seed, in OUT/NAME_sSEED
    local name=$1 seed folder
    shift
    for seed in "${seeds[@]}"; do
        folder=$out/${name}_s$seed
        runs+=("$folder")
        if [[ -f $folder/model/config.json ]]; then
            echo "$folder is complete"
        elif [[ -f $folder/checkpoint.pt || -f $folder/checkpoint.prev.pt ]]; then
            python "${MAIN:-main_imp_fillback.py}" --resume --save_dir "$folder"
        else
            # ${x[@]+...}: older bashes take an empty array for an unset one
            python "${MAIN:-main_imp_fillback.py}" --dataset "$dataset" --seed "$seed" "$@" \
                ${flags[@]+"${flags[@]//\{seed\}/$seed}"} --overwrite --save_dir "$folder"
        fi
    done
}

compare() { python "${REPORT:-report.py}" "${runs[@]}" --out "$out/report"; }
