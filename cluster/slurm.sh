#!/usr/bin/env bash
# A Slurm job: one Ray cluster over all nodes of the allocation, and one run on it. Submit it in the folder of mine.py:
#
#   sbatch PATH/TO/cluster/slurm.sh mine.py:Net --num-heads 8 --storage /shared/runs --name net-8
#
# The arguments are those of `lte-ray train`. --name and a --storage that all nodes can access are needed to continue a run.
# If the run ends early but can be resumed (exit code 75), the job goes back into the queue and continues it.
#SBATCH --job-name=lte-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# --exclusive: `ray symmetric-run` ends with `ray stop`, which ends every Ray of yours on the node.
# --requeue: Slurm itself requeues the job if it preempts it or loses a node.
set -euo pipefail

# Saves and ends with exit code 75 before Slurm ends the job. Shorter than --time above, by what saving and exporting takes.
max_time=${MAX_TIME:-23h30m}

# The address of the first node, on which this script runs. If nodes have several networks, name the fast one's address here:
# the other nodes use the network that leads to it.
address=${HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}:${PORT:-6379}

# Everyone on the nodes' network could use the cluster without a token. The token is in ~/.ray, which all nodes share.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}  # seconds for all nodes to join

code=0
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
    lte-ray train "$@" --address auto --max-time "$max_time" --resume || code=$?

if [ "$code" -eq 75 ]; then
    echo "The run ended early and can be resumed: requeueing job $SLURM_JOB_ID."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
