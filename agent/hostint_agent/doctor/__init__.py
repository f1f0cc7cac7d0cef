# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent doctor`: what is wrong with a node, and what to do about it."""
