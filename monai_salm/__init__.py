# SPDX-License-Identifier: Apache-2.0
"""Protected copies of medical image data sets by sparsity-aware local masking (SALM)."""

__version__ = "0.1.0"
