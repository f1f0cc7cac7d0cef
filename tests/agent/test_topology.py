# SPDX-License-Identifier: Apache-2.0
"""Which port id is which interface, and what of it is measured."""

from hostint_agent import attach, interfaces, topology


def test_ports_are_told_with_their_interfaces():
    uplink = interfaces.Interface(2, "eth0", "uplink", ("192.0.2.1", "2001:db8::1"))
    pod = interfaces.Interface(70_000, "veth1", "pod", ())
    attached = attach.Attachment(uplink, 2, "tcx")
    failed = attach.Attachment(pod, 65535, "tcx", "no room")
    # 0 in a report is the host
    without = attach.Attachment(interfaces.Interface(9, "veth9", "pod", ()), 0, "tcx", "no port id")
    assert topology.document("n1", 7, attach.State((attached, failed, without))) == {
        "node": "n1",
        "nodeID": 7,
        "links": [
            {
                "id": 2,
                "ifindex": 2,
                "name": "eth0",
                "ip-addresses": ["192.0.2.1", "2001:db8::1"],
                "is-node-iface": True,
                "attached": True,
            },
            {
                "id": 65535,
                "ifindex": 70_000,
                "name": "veth1",
                "ip-addresses": [],
                "is-node-iface": False,
                "attached": False,
            },
        ],
    }
