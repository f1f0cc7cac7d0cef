# SPDX-License-Identifier: Apache-2.0
"""Nodes and pods as network namespaces, with real traffic between them: what needs packets and no Kubernetes."""

from tests.lab.agent import LabAgent
from tests.lab.namespace import Namespace
from tests.lab.topology import Lab, Node, Pod

__all__ = ["Lab", "LabAgent", "Namespace", "Node", "Pod"]
