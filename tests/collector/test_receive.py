# SPDX-License-Identifier: Apache-2.0
"""What comes out of the collector's socket."""

import socket

from hostint_collector import receive


def test_empty_datagrams_are_left_out():
    receiver = receive.Receiver("127.0.0.1", 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for data in (b"", b"one", b"", b"two", b""):
            sender.sendto(data, ("127.0.0.1", receiver.port))
        assert receiver.wait(5)
        assert [data for data, _ in receiver.burst()] == [b"one", b"two"]
    receiver.close()
