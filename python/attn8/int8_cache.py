# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""A KV cache for Transformers that keeps K and V as INT8 codes and reads them without widening."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from attn8 import _core
from attn8.arrays import Array, without_grad
from attn8.errors import UnsupportedError
from attn8.quantization import QuantizedTensor
from attn8.runtime import threads_for


class _Int8Layer(DynamicLayer):  # type: ignore[misc]
    """K and V of one layer: codes and a scale per token, K less its mean over the first append.

    The codes lie in buffers that double when they are full; what :meth:`update` returns are views
    of them. Any mean is right, because softmax does not see it: one that is near the mean of all
    tokens makes the codes finer.
    """

    is_sliding = False

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.tokens = 0
        self.buffers: list[torch.Tensor] = []  # K codes, K scale, V codes, V scale
        self.mean: torch.Tensor | None = None
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.device.type != "cpu":
            raise UnsupportedError(f"key_states: got device {self.device}, want cpu")
        if value_states is not None and value_states.shape != key_states.shape:
            raise UnsupportedError(
                f"value_states: got shape {tuple(value_states.shape)}, want "
                f"{tuple(key_states.shape)}, as key_states"
            )
        shapes = ((torch.int8, dim), (torch.float32, 1))
        self.buffers = [
            torch.empty((batch, heads, 0, last), dtype=dtype) for dtype, last in shapes * 2
        ]
        self.is_initialized = True

    def _reserve(self, tokens: int) -> None:
        capacity = self.buffers[0].shape[2]
        if tokens <= capacity:
            return
        capacity = max(2 * capacity, tokens + 64)  # 64: the first steps after a prompt fit
        grown = []
        for held in self.buffers:
            batch, heads, _, last = held.shape
            larger = torch.empty((batch, heads, capacity, last), dtype=held.dtype)
            larger[:, :, : self.tokens] = held[:, :, : self.tokens]
            grown.append(larger)
        self.buffers = grown

    def _views(self, first: int, last: int) -> list[torch.Tensor]:
        return [held[:, :, first:last] for held in self.buffers]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize and append the new tokens; return the codes of all, with their layer."""
        key_states = without_grad(key_states, "key_states")
        value_states = without_grad(value_states, "value_states")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self._reserve(self.tokens + new)
        if new > 0:
            use = "given"
            if self.mean is None:
                batch, heads, _, dim = key_states.shape
                self.mean, use = torch.empty((batch, heads, 1, dim)), "compute"
            k_codes, k_scale, v_codes, v_scale = self._views(self.tokens, self.tokens + new)
            threads = threads_for(key_states, None)
            form = ("bhsd", "token", 0, threads)
            _core.quantize(key_states, k_codes, k_scale, self.mean, use, *form)
            _core.quantize(value_states, v_codes, v_scale, None, "none", *form)
            self.tokens += new
        self._expose()
        return self.keys, self.values

    def _expose(self) -> None:
        """Make keys and values views of the codes that know where their scales are."""
        keys, _, values, _ = self._views(0, self.tokens)
        keys.attn8_layer = values.attn8_layer = self
        self.keys, self.values = keys, values

    def operands(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Return K and V of all tokens, layout "bshd"."""
        k, k_scale, v, v_scale = (x.transpose(1, 2) for x in self._views(0, self.tokens))
        mean = None if self.mean is None else self.mean.transpose(1, 2)
        return QuantizedTensor(k, k_scale, mean=mean), QuantizedTensor(v, v_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, without room to spare."""
        parts = [*self._views(0, self.tokens), *([] if self.mean is None else [self.mean])]
        return sum(part.nbytes for part in parts)

    def get_seq_length(self, *_args: Any) -> int:
        return self.tokens

    def reset(self) -> None:
        self._clear()

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens, or drop ``-max_length`` from the end."""
        keep = max_length if max_length > 0 else self.tokens + max_length
        if self.is_initialized and keep < self.tokens:
            self.tokens = max(keep, 0)
            self._expose()

    def _select(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.buffers = [held.index_select(0, indices) for held in self.buffers]
            if self.mean is not None:
                self.mean = self.mean.index_select(0, indices)
            self._expose()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.buffers[0].shape[0])[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.buffers[0].shape[0]).repeat_interleave(repeats))


class Int8Cache(Cache):  # type: ignore[misc]
    """``past_key_values`` that keeps K and V in INT8, for models that run on attn8.

    A token takes ``2 * (head_dim + 4)`` bytes per kv head, about a quarter of float32. New tokens
    are quantized once, when they arrive; attention reads the codes. Layers with a sliding window
    keep all tokens. Only attention registered by :func:`attn8.transformers.register` can read it:
    any other implementation is handed int8 tensors and fails on their type.
    """

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__(layer_class_to_replicate=_Int8Layer)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers if layer.is_initialized)


def quantized_of(key: Array, value: Array) -> tuple[Any, Any]:
    """Return K and V as attention takes them in layout "bshd"; codes with their scales."""
    if key.dtype != torch.int8:
        return key.transpose(1, 2), value.transpose(1, 2)
    if not isinstance(getattr(key, "attn8_layer", None), _Int8Layer):
        raise ValueError("key: got int8 codes that belong to no Int8Cache, want floats")
    layer: Any = key.attn8_layer
    if not hasattr(value, "attn8_layer") or value.attn8_layer is not layer:
        raise ValueError("value: got other than what came with key, want codes of the same layer")
    if key.shape[2] != layer.tokens:
        raise ValueError(f"key: got {key.shape[2]} tokens, want the {layer.tokens} of its cache")
    k, v = layer.operands()
    return k, v
