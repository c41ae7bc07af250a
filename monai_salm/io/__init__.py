# SPDX-License-Identifier: Apache-2.0
"""File formats: exact stored values in, derived files out."""
