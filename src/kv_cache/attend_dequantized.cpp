// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <memory>

#include "core/slices.hpp"
#include "cpu/parallel.hpp"
#include "kv_cache/attend_batch.hpp"

namespace attn8::kv_cache {
namespace {

/// K and V of one sequence and a stretch of its kv heads, dense [1, length, heads, dim]: V as
/// floats, K as floats or as codes with their scales.
class Unpacked {
 public:
  Unpacked(const KvCache::State& cache, const Sequence& sequence, const HeadStretch& heads)
      : cache_(cache),
        sequence_(sequence),
        heads_(heads),
        k_shape_{1, sequence.length, heads.count, cache.options.head_dim},
        v_shape_{1, sequence.length, heads.count, cache.options.head_dim_v},
        scale_shape_{1, sequence.length, heads.count, 1},
        v_(std::make_unique_for_overwrite<float[]>(elements(v_shape_))) {
    if (heads.mode == Mode::kExact) {
      k_ = std::make_unique_for_overwrite<float[]>(elements(k_shape_));
    } else {
      k_codes_ = std::make_unique_for_overwrite<int8_t[]>(elements(k_shape_));
      k_scale_ = std::make_unique_for_overwrite<float[]>(elements(scale_shape_));
    }
  }

  void read(const Context& context) noexcept {
    const auto pages = static_cast<int64_t>(sequence_.pages.size());
    cpu::for_each_task(context, pages * heads_.count, [&](int64_t task, int64_t) {
      read_block(task / heads_.count, task % heads_.count);
    });
  }

  [[nodiscard]] Operand k() const noexcept {
    if (k_ != nullptr) return view(k_.get(), DType::kFloat32, k_shape_);
    QuantizedView k = {view(k_codes_.get(), DType::kInt8, k_shape_),
                       view(k_scale_.get(), DType::kFloat32, scale_shape_)};
    if (const float* mean = k_mean(0); mean != nullptr) {
      k.mean = view(mean, DType::kFloat32, {1, 1, heads_.count, k_shape_[3]});
    }
    return k;
  }
  [[nodiscard]] Operand v() const noexcept { return view(v_.get(), DType::kFloat32, v_shape_); }

 private:
  static size_t elements(const Extents& shape) noexcept {
    return static_cast<size_t>(shape[1] * shape[2] * shape[3]);
  }
  static ConstTensorView view(const void* data, DType dtype, const Extents& shape) noexcept {
    return bshd(data, dtype, shape);
  }

  /// [head_dim] of a head of the stretch; nullptr: nothing was subtracted.
  [[nodiscard]] const float* k_mean(int64_t head) const noexcept {
    if (sequence_.k_mean.empty()) return nullptr;
    return sequence_.k_mean.data() + (heads_.first + head) * cache_.options.head_dim;
  }

  void read_block(int64_t page, int64_t head) noexcept {
    const PageBlock block =
        cache_.pool.block(sequence_.pages[static_cast<size_t>(page)], heads_.first + head);
    const int64_t first = page * cache_.options.page_size;
    const int64_t keys = std::min<int64_t>(sequence_.length - first, cache_.options.page_size);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t row = (first + key) * heads_.count + head;
      read_k(block, key, head, row);
      read_v(block, key, row);
    }
  }

  /// Whether K or V of the token held a NaN or an Inf: then both stand for NaN.
  static bool poisoned(const PageBlock& block, int64_t key) noexcept {
    return block.memory.poison()[key] != 0;
  }

  void read_k(const PageBlock& block, int64_t key, int64_t head, int64_t row) const noexcept {
    const int64_t slot = key % kKeyGroup;
    const auto* codes = reinterpret_cast<const int8_t*>(block.memory.k(key / kKeyGroup));
    const float scale =
        poisoned(block, key) ? kNan : block.memory.record(key / kKeyGroup).k_scale[slot];
    const int64_t dim = k_shape_[3];
    if (k_ == nullptr) {
      k_scale_[row] = scale;
      for (int64_t d = 0; d < dim; ++d) {
        k_codes_[row * dim + d] = codes[packed_k_offset(slot, d)];
      }
      return;
    }
    const float* mean = k_mean(head);
    for (int64_t d = 0; d < dim; ++d) {
      const float value = static_cast<float>(codes[packed_k_offset(slot, d)]) * scale;
      k_[row * dim + d] = mean != nullptr ? value + mean[d] : value;
    }
  }

  void read_v(const PageBlock& block, int64_t key, int64_t row) const noexcept {
    const auto* codes = reinterpret_cast<const int8_t*>(block.memory.v(key / kKeyGroup));
    const int64_t padded = padded_dim(cache_.packed_dim());
    const float scale = poisoned(block, key) ? kNan : block.v_scale[key];
    const int64_t dim = v_shape_[3];
    for (int64_t d = 0; d < dim; ++d) {
      const int8_t code = codes[packed_v_offset(key % kKeyGroup, d, padded)];
      v_[row * dim + d] = static_cast<float>(code) * scale;
    }
  }

  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  const KvCache::State& cache_;
  const Sequence& sequence_;
  const HeadStretch& heads_;
  const Extents k_shape_, v_shape_, scale_shape_;
  std::unique_ptr<float[]> v_;
  std::unique_ptr<float[]> k_;  ///< in kExact; else:
  std::unique_ptr<int8_t[]> k_codes_;
  std::unique_ptr<float[]> k_scale_;
};

}  // namespace

Status attend_dequantized(const AttendBatch& batch, const HeadStretch& heads,
                          const AttentionInputs& inputs, const AttentionOutputs& outputs) {
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const int64_t first = batch.cu_seqlens_q[i];
    const int64_t rows = batch.cu_seqlens_q[i + 1] - first;
    if (rows == 0) continue;
    const Sequence& sequence = *batch.sequences[i];
    Unpacked unpacked(batch.cache, sequence, heads);
    unpacked.read(batch.context);
    AttentionInputs part = inputs;
    part.q = slice(inputs.q, 1, first, rows);
    part.k = unpacked.k();
    part.v = unpacked.v();
    if (part.attn_mask.has_value()) {
      part.attn_mask =
          slice_or_all(slice_or_all(*part.attn_mask, 1, first, rows), 3, 0, sequence.length);
    }
    AttentionOutputs part_outputs = {slice(outputs.out, 1, first, rows)};
    if (outputs.lse.has_value()) part_outputs.lse = slice(*outputs.lse, 1, first, rows);
    AttentionOptions options = {.mode = heads.mode,
                                .softmax_scale = batch.softmax_scale,
                                .mask = batch.options.mask,
                                .kv_block = batch.cache.options.page_size,
                                .smooth_k = false};
    options.softcap = batch.options.softcap;
    Status status = attention(part, part_outputs, options, batch.context);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace attn8::kv_cache
