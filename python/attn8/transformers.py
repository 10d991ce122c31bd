# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 inside Hugging Face Transformers (4.57 and 5.x): attention, masks, and an INT8 cache.

>>> import attn8.transformers
>>> attn8.transformers.register()
>>> # model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn8")
>>> # model.generate(**inputs, past_key_values=attn8.transformers.Int8Cache())
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from attn8.arrays import without_grad
from attn8.errors import UnsupportedError
from attn8.functional import attention
from attn8.int8_cache import Int8Cache, layer_of
from attn8.padding import KeyRange, attend_ranges
from attn8.rotation import rotate

__all__ = ["Int8Cache", "attention_function", "register"]

Window = tuple[int, int]

# Arguments of attention that change its result, in one model or another, and are not computed.
_REFUSED = (
    "softcap",
    "s_aux",
    "position_bias",
    "head_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cache",
    "block_table",
)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=True))


def _narrower(a: int, b: int) -> int:
    return max(a, b) if -1 in (a, b) else min(a, b)


def _window_of(function: Any) -> tuple[bool, Window]:
    """Read causality and window off a mask function of transformers.

    The functions are closures made by transformers' own factories; their names and variables are
    what tells them apart. Whatever is not known raises: a mask that is ignored would give wrong
    results in silence.
    """
    if function is causal_mask_function:
        return True, (-1, -1)
    # 4.57 has none: its encoders make their masks themselves.
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, (-1, -1)
    name = getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
    variables = _closure(function) if hasattr(function, "__closure__") else {}
    if name == "and_masks":
        causal, window = False, (-1, -1)
        for part in variables["mask_functions"]:
            part_causal, (left, right) = _window_of(part)
            causal = causal or part_causal
            window = _narrower(window[0], left), _narrower(window[1], right)
        return causal, window
    if name == "sliding_window_overlay":  # kv > q - sliding_window
        return False, (int(variables["sliding_window"]) - 1, -1)
    if name == "sliding_window_bidirectional_overlay":  # |q - kv| <= sliding_window
        width = int(variables["sliding_window"])
        return False, (width, width)
    raise UnsupportedError(
        f"mask_function: got {name}, want causal, bidirectional or a sliding window of these"
    )


def _mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    **_options: Any,
) -> torch.Tensor | None:
    """Return None, or the padding ``[batch, kv_length]`` with the window as an attribute.

    Registered as the mask function; transformers 4.57 passes ``cache_position`` where 5.x passes
    ``q_length`` and ``q_offset``.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
    causal, window = _window_of(mask_function)
    end_of_queries, end_of_keys = int(q_offset) + int(q_length), int(kv_offset) + int(kv_length)
    if causal and end_of_queries != end_of_keys:
        raise UnsupportedError(
            f"past_key_values: got a cache that holds {end_of_keys} positions for "
            f"{end_of_queries} tokens, want one without room to spare (DynamicCache, Int8Cache)"
        )
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, int(kv_offset) : end_of_keys].bool()
        if padding.shape[1] != kv_length:
            raise ValueError(
                f"attention_mask: got {attention_mask.shape[1]} tokens, want {end_of_keys}"
            )
        if bool(padding.all()):
            padding = None
    if window == (-1, -1):
        return padding
    if padding is None:
        padding = torch.ones((batch_size, kv_length), dtype=torch.bool)
    padding.attn8_window = window
    return padding


def _ranges(padding: torch.Tensor) -> list[KeyRange]:
    """Return first and last key of each row of a padding mask, which must have no holes."""
    found: list[KeyRange] | None = getattr(padding, "attn8_ranges", None)
    if found is None:
        keys = padding.shape[1]
        counts = padding.sum(1).tolist()
        starts = padding.to(torch.uint8).argmax(1).tolist()
        found = [(s, s + n) for s, n in zip(starts, counts, strict=True)]
        for i, (first, last) in enumerate(found):
            if last > keys or not bool(padding[i, first:last].all()):
                raise UnsupportedError(
                    f"attention_mask: got row {i} with padding between its tokens, want padding "
                    "at its ends only"
                )
        # The layers of one forward pass share the mask: read it once.
        padding.attn8_ranges = found
    return found


def _module_window(sliding_window: int | None, causal: bool) -> Window:
    """Return the window as flash attention reads the argument, which counts the query itself."""
    if sliding_window is None:
        return -1, -1
    return sliding_window - 1, -1 if causal else sliding_window - 1


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    mode: str = "accurate",
    rotated: bool = True,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers asks a registered function to.

    Parameters
    ----------
    query : Tensor
        ``[batch, nheads_q, seqlen_q, head_dim]``.
    key, value : Tensor
        ``[batch, nheads_k, seqlen_k, head_dim]``, not repeated; or the codes of an Int8Cache.
    attention_mask : Tensor, optional
        What :func:`_mask` returned.

    Returns
    -------
    Tensor
        ``[batch, seqlen_q, nheads_q, head_dim]``, contiguous; and None for the weights.
    """
    if dropout != 0:
        raise UnsupportedError(f"dropout: got {dropout}, want 0: attn8 is for inference")
    if options.get("output_attentions"):
        raise UnsupportedError("output_attentions: got True, want False: weights are not kept")
    for name in _REFUSED:
        if options.get(name) is not None:
            raise UnsupportedError(f"{name}: got {type(options[name]).__name__}, want None")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = _module_window(sliding_window, causal)
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise UnsupportedError(
                f"attention_mask: got {attention_mask.ndim} dimensions, want a padding mask "
                "[batch, tokens]"
            )
        masked = getattr(attention_mask, "attn8_window", (-1, -1))
        if masked != (-1, -1):
            if window not in ((-1, -1), masked):
                raise UnsupportedError(
                    f"sliding_window: got {window} from the layer and {masked} from the mask, "
                    "want the same"
                )
            window = masked
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if causal and seqlen_q > seqlen_k:
        raise ValueError(f"key: got {seqlen_k} tokens, want at least the {seqlen_q} of query")
    # A single query sees all keys whatever the diagonal.
    mask: dict[str, Any] = {"causal": causal and seqlen_q > 1, "window_size": window}
    if seqlen_q == 1 and causal:
        mask["window_size"] = (window[0], -1)
    ranges = None
    if attention_mask is not None:
        if attention_mask.shape[1] != seqlen_k:
            raise ValueError(
                f"attention_mask: got {attention_mask.shape[1]} tokens, want {seqlen_k}, as key"
            )
        ranges = _ranges(attention_mask)
    layer = layer_of(key, value)
    if layer is not None:
        if mode != "accurate":
            raise UnsupportedError(
                f"past_key_values: got an Int8Cache with mode {mode}, want accurate"
            )
        return layer.attend(query, ranges, softmax_scale=scaling, **mask), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if rotated and mode in ("accurate", "half"):
        q, k = rotate(without_grad(q, "q")), rotate(without_grad(k, "k"))
    common: dict[str, Any] = {"softmax_scale": scaling, "mode": mode, "layout": "bshd"}
    if ranges is None:
        out = attention(q, k, v, **common, **mask)
    else:
        out = attend_ranges(q, k, v, ranges, **common, **mask)
    return out.to(query.dtype), None


def attention_function(
    mode: str = "accurate", *, rotate: bool = True
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the attention function that :func:`register` registers."""
    return functools.partial(_attention, mode=mode, rotated=rotate)


def register(name: str = "attn8", *, mode: str = "accurate", rotate: bool = True) -> None:
    """Make ``attn_implementation=name`` known to transformers: attention and mask function.

    Parameters
    ----------
    name : str
        What models are told. Several modes can be registered under several names.
    mode : str
        Mode of :func:`attn8.attention`.
    rotate : bool
        Pass q and k through :func:`attn8.rotate` (modes accurate and half). An
        :class:`Int8Cache` has its own switch, because it holds K as it was stored.

    Notes
    -----
    Padding on either side, grouped heads, sliding windows, any cache without spare room, and
    :class:`Int8Cache` are honoured. Score caps, attention sinks, position biases, 4-D masks,
    packed sequences, chunked attention, dropout and ``output_attentions`` raise
    :class:`attn8.UnsupportedError`. Outputs at padded positions are 0 in causal models.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: got {name!r}, want a str that is not empty")
    if mode not in ("accurate", "paper", "half", "exact", "fp8"):
        raise ValueError(f"mode: got {mode!r}, want accurate, paper, half, exact or fp8")
    if not isinstance(rotate, bool):
        raise TypeError(f"rotate: got {type(rotate).__name__}, want a bool")
    AttentionInterface.register(name, attention_function(mode, rotate=rotate))
    AttentionMaskInterface.register(name, _mask)
