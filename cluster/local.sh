#!/usr/bin/env bash
# A one-node Ray cluster with a job server on this machine's loopback address, until Ctrl-C; more flags are ray's own.
#
#   cluster/local.sh &
#   ray job submit --address http://127.0.0.1:8265 --working-dir . -- lte-ray train workers.gpt:GPT --num-heads 2
#
# If ~/.ray/auth_token exists, the cluster requires that token: set RAY_AUTH_MODE=token to submit (docs/clusters.md, Tokens).
set -euo pipefail
exec "${RAY:-ray}" start --head --block --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --disable-usage-stats "$@"
