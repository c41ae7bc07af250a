# SPDX-License-Identifier: Apache-2.0
"""Budgets, masks, objectives and the perturbation methods; torch only."""
