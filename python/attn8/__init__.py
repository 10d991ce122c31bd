# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8: attention in eight bits, for arrays of NumPy, torch, JAX and whatever speaks DLPack."""

from attn8 import reference
from attn8._core import version as _version
from attn8.cuda_cache import CudaKVCache
from attn8.errors import UnavailableError, UnsupportedError
from attn8.flash_cache import flash_attn_with_kvcache
from attn8.functional import attention, attention_varlen, merge_states
from attn8.interfaces import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from attn8.kv_cache import KVCache, KVCacheUsage, KVSequence
from attn8.quantization import QuantizedTensor, dequantize, quantize
from attn8.rotation import rotate
from attn8.runtime import get_num_threads, info, set_num_threads

__version__ = _version()
__all__ = [
    "CudaKVCache",
    "KVCache",
    "KVCacheUsage",
    "KVSequence",
    "QuantizedTensor",
    "UnavailableError",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "dequantize",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_num_threads",
    "info",
    "merge_states",
    "quantize",
    "reference",
    "rotate",
    "scaled_dot_product_attention",
    "set_num_threads",
]
