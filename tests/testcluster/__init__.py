# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes on one machine: control plane, and nodes as network namespaces with kubelet, containerd and kube-proxy.

Standard library only: it also runs where nothing of ours is installed yet.
"""

from tests.testcluster.cluster import Cluster
from tests.testcluster.control_plane import ControlPlane
from tests.testcluster.node import Node

__all__ = ["Cluster", "ControlPlane", "Node"]
