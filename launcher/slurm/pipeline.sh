#!/usr/bin/env bash
# Submits stages that follow each other, each when the one before has ended well. From the repository's root,
# with everything on a file system that all nodes share:
#
#   launcher/slurm/pipeline.sh \
#       corpus 32 --config configs/corpus_wikipedia.yaml output=/shared/wiki -- \
#       --nodes=4 general --config configs/general_4x312.yaml data.corpus=/shared/wiki output=/shared/run -- \
#       task sst2,mnli --config configs/task.yaml stage=data task={task} source.path=/shared/glue/{task} output=/shared/{task} -- \
#       task sst2,mnli --config configs/task.yaml stage=teacher task={task} output=/shared/{task} -- ...
#
# A stage is one of corpus, general, task, sweep, with the arguments of its script in this folder; any number of
# them, in any order. Options of sbatch come before it (--array=1-8 sweep ...). It prints the jobs' numbers.
# PIPELINE=NAME in the environment puts all of them under one run of that name in MLflow.
set -euo pipefail

usage() {
    echo "usage: launcher/slurm/pipeline.sh [sbatch options] corpus|general|task|sweep ARGUMENTS [-- ...]" >&2
    exit 2
}

after=()
submit() {
    local options=("${after[@]}") job
    while [[ ${1:-} == -* ]]; do
        options+=("$1")
        shift
    done
    local stage="${1:-}" list="${2:-}"
    if [[ -n ${PIPELINE:-} ]]; then
        case "${stage}" in
            corpus) set -- "$@" "tracking.enabled=true" "tracking.under=[${PIPELINE}]" ;;
            sweep) ;; # its base says where it belongs
            *) set -- "$@" "tracking.under=[${PIPELINE}]" ;;
        esac
    fi
    case "${stage}" in
        corpus)
            job="$(launcher/slurm/corpus.sh "${options[@]}" "${@:2}")"
            echo "corpus: ${job}"
            job="${job##* }"
            ;;
        general | task | sweep)
            if [[ ${stage} == task ]]; then
                options+=("--array=0-$(tr -cd , <<<"${list}" | wc -c)")
            fi
            job="$(sbatch --parsable "${options[@]}" "launcher/slurm/${stage}.sbatch" "${@:2}")"
            job="${job%%;*}"
            echo "${stage}: ${job}"
            ;;
        *) usage ;;
    esac
    after=("--dependency=afterok:${job}" --kill-on-invalid-dep=yes)
}

stage=()
for word in "$@" --; do
    if [[ ${word} != -- ]]; then
        stage+=("${word}")
    else
        submit "${stage[@]}"
        stage=()
    fi
done
