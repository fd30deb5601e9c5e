#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, for trying what happens when a node is lost. It runs until Ctrl-C.
#
#   cluster/local-nodes.sh 3                # a head node that no head of a run is placed on, and 3 nodes with 1 CPU each
#   ray job submit --address http://127.0.0.1:8265 --working-dir . -- lte-ray train mine.py:Net --num-heads 2
#   kill PID                                # loses a node: the script prints each node's process id
#
# CPUS and GPUS set what each of those nodes has. Such GPUs exist only on paper: they show where heads would be placed, but a
# head that gets one fails, since torch finds no GPU. So leave GPUS out to train. PORT, DASHBOARD_PORT and AGENT_PORT move the
# ports. Nodes have the labels ray.io/market-type=on-demand (the head node) and ray.io/market-type=spot (the others). So a run's
# coordinator and evaluator stay on the head node.
#
# It ends only the processes that it started. Tokens are as for local.sh.
set -euo pipefail

nodes=${1:-2} ray=${RAY:-ray} port=${PORT:-6379} agent=${AGENT_PORT:-52365}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || { echo "error: '$nodes' is no number of nodes. Give e.g. 3." >&2; exit 2; }

temporary=$(mktemp -d /tmp/lte-ray-XXXXXX)  # short: Ray's sockets are in it
started=()
end() {
    trap - EXIT INT TERM
    # The head node last, so that it doesn't report nodes as lost. `ray start --block` ends what its node started.
    for pid in $(jobs -p | tac); do
        kill "$pid" 2> /dev/null || true
    done
    wait || true  # for all: bash may block if it waits for one that has just ended
    rm -rf "$temporary"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() {  # NAME FLAGS...: each node needs an agent's port of its own; workers take any free ports
    local name=$1
    shift
    "$ray" start --block --disable-usage-stats --min-worker-port 0 --max-worker-port 0 \
        --dashboard-agent-listen-port "$((agent + ${#started[@]}))" "$@" &
    started+=("$!")
    echo "$name: process $!"
}

start "head node" --head --node-ip-address 127.0.0.1 --port "$port" --dashboard-host 127.0.0.1 \
    --dashboard-port "${DASHBOARD_PORT:-8265}" --num-cpus 0 --num-gpus 0 --labels ray.io/market-type=on-demand
until (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
    kill -0 "${started[0]}" 2> /dev/null || { echo "error: The head node didn't start." >&2; exit 1; }
    sleep 1
done
for ((n = 1; n <= nodes; n++)); do  # each with a folder of its own: in a common one, nodes remove the files of jobs
    start "node $n" --address "127.0.0.1:$port" --temp-dir "$temporary/$n" --num-cpus "${CPUS:-1}" --num-gpus "${GPUS:-0}" \
        --labels ray.io/market-type=spot
done

wait "${started[0]}"  # the cluster ends with its head node
