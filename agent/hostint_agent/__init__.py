# SPDX-License-Identifier: Apache-2.0
"""The agent on every node: loads and attaches the datapath, programs its tables, exports reports, tells its status."""
