# SPDX-License-Identifier: Apache-2.0
"""Decode a report of any version we know, told apart by the first four bits."""

from hostint_report import v05


def decode(data: bytes) -> v05.Report:
    """Read one datagram. Raises v05.MalformedReport."""
    if not data:
        raise v05.MalformedReport("empty datagram", 0)
    version = data[0] >> 4
    if version != v05.VERSION:
        raise v05.MalformedReport(f"version {version} is not supported, only 0 (v0.5) is", 0)
    return v05.decode(data)
