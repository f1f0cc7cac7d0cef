# SPDX-License-Identifier: Apache-2.0
"""The path matrix: every way that a packet can take through a node, with traffic on it whose every packet is known.

`wiring` builds the ways, `table` lists them, `traffic` runs flood.c, `bench` puts datapath, recorders and traffic together.
"""
