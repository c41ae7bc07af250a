# SPDX-License-Identifier: Apache-2.0
"""Cohorts that exercise the whole house without a download; imported by nobody."""

from __future__ import annotations
