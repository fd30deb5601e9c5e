"""Jobs on a Ray cluster, seen from where they are submitted: what is sent, and the cluster's job server."""
