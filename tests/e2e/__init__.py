# SPDX-License-Identifier: Apache-2.0
"""The whole path on a real Kubernetes: what must hold, and the demo."""
