# SPDX-License-Identifier: Apache-2.0
"""The wire: INT telemetry reports, encoded and decoded. Pure; knows no other package of this project."""
