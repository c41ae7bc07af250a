# SPDX-License-Identifier: Apache-2.0
"""MONAI bundles that ship with monai_salm: wiring only."""
