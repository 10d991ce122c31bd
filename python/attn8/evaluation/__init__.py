# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What INT8 attention does to real models: ``python -m attn8 eval``."""
