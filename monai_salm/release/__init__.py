# SPDX-License-Identifier: Apache-2.0
"""Cases, labels, identities and the one door into the output folder."""
