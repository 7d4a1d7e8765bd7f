# The end of every job script that distils, in the checkout's folder: `. launcher/slurm/distil.sh`.
# It replaces the script by the supervisor around `srun`, on all the job's nodes.
# shellcheck shell=bash

export DS_ACCELERATOR="${DS_ACCELERATOR:-cuda}" # a node without working GPUs fails at once
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch by itself
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# Where nodes have several networks, name the fast one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

options=() inside=()
# In a container, with what the run reads and writes mounted at the same paths. The supervisor stays outside;
# any Python from 3.10 on runs it, and SUPERVISOR_PYTHON="${PYTHON:-.venv/bin/python}"
# Options of launcher/supervise.py, from sbatch's environment. SUPERVISE="--min-nodes 3" with sbatch --no-kill
# goes on in place with three nodes; but if the first node is lost, --no-kill leaves a job that does nothing.
read -ra supervise <<<"${SUPERVISE:-}"

# One lost task ends the step: the others would wait for it in their next collective.
exec "${SUPERVISOR_PYTHON:-${PYTHON}}" launcher/supervise.py "${supervise[@]}" -- \
    srun --kill-on-bad-exit=1 --wait=30 "${options[@]}" "${inside[@]}" "${PYTHON}" "${LAUNCHER:-launcher/general.py}" "$@"
