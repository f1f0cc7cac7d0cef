# SPDX-License-Identifier: Apache-2.0
"""What the options of an agent mean."""

import pytest

from hostint_agent import settings


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("none", None),
        ("[::]:9464", ("::", 9464)),
        (":9464", ("::", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[fd98::1]:9464", ("fd98::1", 9464)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_listen_address(text, listen):
    assert settings.parse_listen(text) == listen


@pytest.mark.parametrize("text", ["", "9464", "host:", "host:http", "host:65536", "host:-1"])
def test_listen_address_without_a_port_is_refused(text):
    with pytest.raises(ValueError, match="is not HOST:PORT or none"):
        settings.parse_listen(text)


def test_node_addresses_are_written_as_the_kernel_writes_them():
    assert settings.parse_addresses("") == ()
    assert settings.parse_addresses("192.0.2.1, FD00:0::1") == ("192.0.2.1", "fd00::1")
    with pytest.raises(ValueError, match="'node-a' does not appear to be"):
        settings.parse_addresses("node-a")


def test_networks():
    assert settings.parse_networks("") == ()
    networks = settings.parse_networks("10.244.0.0/16, fd00::/8,192.0.2.9")
    assert [str(network) for network in networks] == ["10.244.0.0/16", "fd00::/8", "192.0.2.9/32"]


@pytest.mark.parametrize(
    "text", ["10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0", "x", "/"]
)
def test_network_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is not a CIDR"):
        settings.parse_networks(text)
