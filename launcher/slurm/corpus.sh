#!/usr/bin/env bash
# A corpus over many nodes: submits three jobs that follow each other, two of them arrays. From the repository's
# root, with everything on a file system that all nodes share:
#
#   launcher/slurm/corpus.sh 32 --config configs/corpus_wikipedia.yaml output=/shared/enwiki
#
# The first argument is the number of tasks of each array; the rest goes to `launcher/corpus.py build`. Options of
# sbatch come before it, or from its environment: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT ...
# If a task fails, submit the same again: what is finished is not made again. It prints the jobs' numbers.
set -euo pipefail

options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
done
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launcher/slurm/corpus.sh [sbatch options] TASKS --config FILE [key=value ...]" >&2
    exit 2
fi
tasks="$1"
shift

# The number of tasks is passed on: Slurm's own count changes when some tasks of an array are submitted again.
job="launcher/slurm/corpus.sbatch"
array="--array=0-$((tasks - 1))"
after() { echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"; }

prepare="$(sbatch --parsable "${options[@]}" "${array}" "${job}" prepare "${tasks}" "$@")"
# shellcheck disable=SC2046 # two options
pack="$(sbatch --parsable "${options[@]}" $(after "${prepare%%;*}") "${array}" "${job}" pack "${tasks}" "$@")"
# shellcheck disable=SC2046
join="$(sbatch --parsable "${options[@]}" $(after "${pack%%;*}") --array=0 --cpus-per-task=1 "${job}" join "${tasks}" "$@")"
echo "prepare ${prepare%%;*}, pack ${pack%%;*}, join ${join%%;*}"
