# SPDX-License-Identifier: Apache-2.0
"""Names of kernel functions as people are shown them."""

import pytest

from hostint_agent import counters


@pytest.mark.parametrize(
    ("symbol", "function"),
    [
        ("ip_error+0x94/0x220", "ip_error"),
        ("nft_do_chain+0x1d/0x2c0 [nf_tables]", "nft_do_chain"),
        ("ip_rcv_core.isra.0+0x1d/0x2c0", "ip_rcv_core"),
        ("neigh_probe.part.0.cold+0x1/0x9", "neigh_probe"),
        ("f" * 55, "f" * 55),
    ],
)
def test_function_name_is_that_in_the_source(symbol, function):
    assert counters.function_name(symbol) == function


@pytest.mark.parametrize("symbol", ["0xffffffff8148c3a2", ""])
def test_function_name_is_never_an_address(symbol):
    assert counters.function_name(symbol) == "unknown"
