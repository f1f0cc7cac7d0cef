# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.testcluster up|down|build`: the test cluster by hand."""

import argparse
import sys

from tests.testcluster import binaries, images
from tests.testcluster.cluster import Cluster, ClusterBusy


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.testcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "build"))
    parser.add_argument("--nodes", type=int, default=2, choices=(1, 2, 3))
    options = parser.parse_args()
    if options.command == "build":
        binaries.ensure()
        images.build_all()
        return 0
    try:
        if options.command == "down":
            Cluster(nodes=options.nodes).stop()
            return 0
        cluster = Cluster(nodes=options.nodes, wanted_images=images.build_all(), say=print)
        try:
            cluster.start()
        except BaseException:
            cluster.stop()
            raise
    except ClusterBusy as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    cluster.release()
    print(f"export KUBECONFIG={cluster.kubeconfig} PATH={cluster.plane.bin_dir}:$PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())
