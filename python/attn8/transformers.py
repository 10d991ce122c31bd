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
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from attn8.errors import UnsupportedError
from attn8.functional import attention
from attn8.int8_cache import Int8Cache, layer_of
from attn8.padding import KeyRange
from attn8.policy import HeadPolicy

__all__ = ["Int8Cache", "attention_function", "register"]

Window = tuple[int, int]

# Arguments of attention that change its result, in one model or another, and are not computed.
_REFUSED = (
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


def _window_of(function: Any) -> tuple[bool, Window] | None:
    """Read causality and window off a mask function of transformers; None where it is another.

    The functions are closures made by transformers' own factories; their names and variables are
    what tells them apart.
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
            read = _window_of(part)
            if read is None:
                return None
            part_causal, (left, right) = read
            causal = causal or part_causal
            window = _narrower(window[0], left), _narrower(window[1], right)
        return causal, window
    if name == "sliding_window_overlay":  # kv > q - sliding_window
        return False, (int(variables["sliding_window"]) - 1, -1)
    if name == "sliding_window_bidirectional_overlay":  # |q - kv| <= sliding_window
        width = int(variables["sliding_window"])
        return False, (width, width)
    return None


def _mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """Return None, the padding ``[batch, kv_length]`` with the window as an attribute, or a mask.

    Registered as the mask function; transformers 4.57 passes ``cache_position`` where 5.x passes
    ``q_length`` and ``q_offset``. A mask bool ``[batch, 1, q_length, kv_length]`` stands for what
    is no window: packed sequences, chunks, a cache with room to spare.
    """
    where = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        where = {"cache_position": cache_position}
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
    read = _window_of(mask_function)
    end_of_queries, end_of_keys = int(q_offset) + int(q_length), int(kv_offset) + int(kv_length)
    if read is None or (read[0] and end_of_queries != end_of_keys):
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense: torch.Tensor | None = masking_utils.sdpa_mask(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask,
            **{**options, **skips, **where},
        )  # fmt: skip
        return dense
    window = read[1]
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


def _ranges(padding: torch.Tensor) -> list[KeyRange] | None:
    """Return first and last key of each row of a padding mask; None where one has holes."""
    # The layers of one forward pass share the mask: read it once.
    if not hasattr(padding, "attn8_ranges"):
        counts = padding.sum(1).tolist()
        starts = padding.to(torch.uint8).argmax(1).tolist()
        found = [(first, first + n) for first, n in zip(starts, counts, strict=True)]
        whole = all(bool(padding[i, first:last].all()) for i, (first, last) in enumerate(found))
        padding.attn8_ranges = found if whole else None
    ranges: list[KeyRange] | None = padding.attn8_ranges
    return ranges


def _module_window(sliding_window: int | None, causal: bool) -> Window:
    """Return the window as flash attention reads the argument, which counts the query itself."""
    if sliding_window is None:
        return -1, -1
    return sliding_window - 1, -1 if causal else sliding_window - 1


def _layer_index(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UnsupportedError(
            f"policy: got {type(module).__name__} without layer_idx, want a layer that has it"
        )
    return index


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    mode: str = "accurate",
    rotated: bool = True,
    kv_block: int = 128,
    policy: HeadPolicy | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers asks a registered function to.

    Parameters
    ----------
    query : Tensor
        ``[batch, nheads_q, seqlen_q, head_dim]``.
    key, value : Tensor
        ``[batch, nheads_k, seqlen_k, head_dim]``, not repeated; or the stand-ins of an Int8Cache.
    attention_mask : Tensor, optional
        What :func:`_mask` returned, or the user's own mask of 4 dimensions, bool or added.
    softcap : float, optional
        Of the scores.
    s_aux : Tensor, optional
        Attention sinks ``[nheads_q]``.

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
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    dense = ranges = None
    if attention_mask is not None and attention_mask.ndim == 4:
        dense, causal, window = attention_mask, False, (-1, -1)
    elif attention_mask is not None:
        if attention_mask.ndim != 2:
            raise UnsupportedError(
                f"attention_mask: got {attention_mask.ndim} dimensions, want 2 or 4"
            )
        masked = getattr(attention_mask, "attn8_window", (-1, -1))
        if masked != (-1, -1):
            if window not in ((-1, -1), masked):
                raise UnsupportedError(
                    f"sliding_window: got {window} from the layer and {masked} from the mask, "
                    "want the same"
                )
            window = masked
        if attention_mask.shape[1] != seqlen_k:
            raise ValueError(
                f"attention_mask: got {attention_mask.shape[1]} tokens, want {seqlen_k}, as key"
            )
        ranges = _ranges(attention_mask)
        if ranges is None:
            dense = attention_mask[:, None, None]
    if causal and seqlen_q > seqlen_k:
        raise ValueError(f"key: got {seqlen_k} tokens, want at least the {seqlen_q} of query")
    # A single query sees all keys whatever the diagonal.
    common: dict[str, Any] = {"causal": causal and seqlen_q > 1, "window_size": window}
    if seqlen_q == 1 and causal:
        common["window_size"] = (window[0], -1)
    common["softmax_scale"] = scaling
    if softcap is not None:
        common["softcap"] = softcap
    if s_aux is not None:
        common["sinks"] = s_aux.detach().to(torch.float32)
    modes = None if policy is None else policy.modes(_layer_index(module), key.shape[1])
    layer = layer_of(key, value)
    if layer is not None:
        if mode != "accurate":
            raise UnsupportedError(
                f"past_key_values: got an Int8Cache with mode {mode}, want DynamicCache"
            )
        common.update(attn_mask=dense, head_modes=modes)
        return layer.attend(query, ranges, **common), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    finer = rotated and mode in ("accurate", "half")
    if ranges is not None:
        # Queries keep their positions among the padded keys.
        common.update(align="top_left", q_offset=seqlen_k - seqlen_q)
        first, last = torch.tensor(ranges, dtype=torch.int32, device=query.device).unbind(1)
        common.update(leftpad_k=first, seqlens_k=last)
    if query.device.type == "cpu":  # each CUDA kernel has a block of its own
        common["kv_block"] = kv_block
    out = attention(q, k, v, attn_mask=dense, mode=mode, head_modes=modes, rotate=finer, **common)
    return out, None


def attention_function(
    mode: str = "accurate",
    *,
    rotate: bool = True,
    kv_block: int = 128,
    policy: HeadPolicy | None = None,
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the attention function that :func:`register` registers."""
    return functools.partial(
        _attention, mode=mode, rotated=rotate, kv_block=kv_block, policy=policy
    )


def register(
    name: str = "attn8",
    *,
    mode: str = "accurate",
    rotate: bool = True,
    kv_block: int = 128,
    policy: str | os.PathLike[str] | None = None,
) -> None:
    """Make ``attn_implementation=name`` known to transformers: attention and mask function.

    Parameters
    ----------
    name : str
        What models are told. Several modes can be registered under several names.
    mode : str
        Mode of :func:`attn8.attention`.
    rotate : bool
        As for :func:`attn8.attention`, in modes accurate and half. An :class:`Int8Cache` has its
        own switch, because it holds K and V as they were stored.
    kv_block : int
        As for :func:`attn8.attention`; an :class:`Int8Cache` has its ``page_size`` instead. Half
        of the library's default rounds P more finely and costs a few percent of the time.
    policy : str or os.PathLike, optional
        A file of ``attn8 calibrate`` (docs/precision.md): the modes of single heads, all others
        running in accurate. It is read once, here. Attention layers need the attribute
        ``layer_idx``, as those of Transformers have it.

    Notes
    -----
    Padding, grouped heads, sliding windows, score caps, attention sinks, masks of 4 dimensions,
    packed sequences, chunked attention, any cache of Transformers and :class:`Int8Cache` are
    honoured. Position biases, dropout and ``output_attentions`` raise
    :class:`attn8.UnsupportedError`. Outputs at padded positions mean nothing.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: got {name!r}, want a str that is not empty")
    if mode not in ("accurate", "paper", "half", "exact", "fp8"):
        raise ValueError(f"mode: got {mode!r}, want accurate, paper, half, exact or fp8")
    if not isinstance(rotate, bool):
        raise TypeError(f"rotate: got {type(rotate).__name__}, want a bool")
    if isinstance(kv_block, bool) or not isinstance(kv_block, int):
        raise TypeError(f"kv_block: got {type(kv_block).__name__}, want an int")
    if kv_block != 0 and (kv_block % 64 != 0 or not 64 <= kv_block <= 512):
        raise ValueError(f"kv_block: got {kv_block}, want 0 or a multiple of 64 up to 512")
    if policy is not None and mode != "accurate":
        raise ValueError(f"mode: got {mode!r} with a policy, want accurate")
    heads = None if policy is None else HeadPolicy(policy)
    function = attention_function(mode, rotate=rotate, kv_block=kv_block, policy=heads)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _mask)
