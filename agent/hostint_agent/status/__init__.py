# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent status`: what the datapath of a node is like now."""
