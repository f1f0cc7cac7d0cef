# SPDX-License-Identifier: Apache-2.0
"""Everything that speaks to the API server; the only package of the operator that imports kubernetes."""
