# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Exceptions of attn8 beside Python's own TypeError, ValueError and MemoryError."""


class UnsupportedError(NotImplementedError):
    """A valid request that nothing in attn8 computes."""


class UnavailableError(RuntimeError):
    """Something attn8 has, but this machine or environment lacks."""
