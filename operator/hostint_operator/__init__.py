# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes operator: watchlists and collectors in, one IntNodeConfig per node out."""
