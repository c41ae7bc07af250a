# SPDX-License-Identifier: Apache-2.0
"""Verification: ``study`` trains victims, ``fidelity`` measures images, ``verdict`` decides, ``report`` shows."""
