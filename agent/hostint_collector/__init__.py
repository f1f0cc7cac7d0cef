# SPDX-License-Identifier: Apache-2.0
"""A small collector for people who have none: receive, decode, count gaps, show."""
