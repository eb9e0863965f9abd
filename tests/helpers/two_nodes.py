"""A Ray cluster of two nodes on this machine, one CPU each; told by lines on standard input to lose and gain them."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        match line.strip():
            case "lose node":
                cluster.remove_node(second, allow_graceful=False)
            case "gain node":
                second = cluster.add_node(num_cpus=1)
            case "lose head":
                cluster.head_node.kill_gcs_server(check_alive=False)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
