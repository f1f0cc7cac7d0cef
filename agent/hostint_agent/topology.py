# SPDX-License-Identifier: Apache-2.0
"""Pure: which port id is which interface, for collectors that show names (as int-host-reporter published it)."""

from typing import Any

from hostint_agent import attach


def document(node: str, node_id: int, state: attach.State) -> dict[str, Any]:
    """The answer to `GET /api/v1/topology`. `id` is the port id that reports carry.

    An interface that has none is left out: in reports 0 means the host.
    """
    return {
        "node": node,
        "nodeID": node_id,
        "links": [
            {
                "id": attachment.port,
                "ifindex": attachment.interface.ifindex,
                "name": attachment.interface.name,
                "ip-addresses": list(attachment.interface.addresses),
                "is-node-iface": attachment.interface.kind == "uplink",
                "attached": attachment.error is None,
            }
            for attachment in state.attachments
            if attachment.port
        ],
    }
