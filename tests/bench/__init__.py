# SPDX-License-Identifier: Apache-2.0
"""`make bench`: what the datapath, the exporter and the agent cost on this machine, each figure beside its baseline."""
