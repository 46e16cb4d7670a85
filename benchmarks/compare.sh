# Sourced by the scripts in this folder: makes the runs of benchmarks/studies/NAME.yaml and compares them as report.py does.
#
#     [OUT=DIR] [PROCESSES=N] bash benchmarks/NAME.sh DATASET SEED... [-- FLAG...]
#
# The same command continues where it was stopped. PROCESSES runs are made at once (see study.py).
# shellcheck shell=bash
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

name=$(basename -- "$0" .sh)
usage="usage: [OUT=DIR] [PROCESSES=N] bash benchmarks/$name.sh DATASET SEED... [-- FLAG...]"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "$usage"
    echo "FLAGs are added to every run, as in: -- --data /usr/share/datasets/fashion-mnist --epochs 10 --pruning_times 4"
    echo "{seed} in a FLAG is replaced by the seed, as in: -- --init results/dense_s{seed}/model/model.safetensors"
    exit
fi
if [[ ! ${2:-} =~ ^[0-9]+$ || $1 == -* ]]; then # no seed, or no data set
    echo "$usage" >&2
    exit 2
fi
dataset=$1 seeds=()
shift
while (($#)) && [[ $1 != -- ]]; do
    seeds+=("$1")
    shift
done
# shellcheck source=/dev/null
source ./setup_env.sh
exec python "${STUDY:-benchmarks/study.py}" "benchmarks/studies/$name.yaml" --report \
    --out "${OUT:-results/${name}_$dataset}" ${PROCESSES:+--processes "$PROCESSES"} \
    --seeds "${seeds[@]}" -- --dataset "$dataset" "${@:2}"
