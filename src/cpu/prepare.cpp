// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "cpu/parallel.hpp"
#include "cpu/run.hpp"

namespace attn8::cpu {
namespace {

constexpr int kMaxDim = 256;

/// Whether a scale can be used; anything else poisons what it scales.
bool usable(float scale) noexcept {
  return scale > 0 && scale <= std::numeric_limits<float>::max();
}

class Preparation {
 public:
  Preparation(const Workspace& workspace, const AttentionInputs& inputs) noexcept
      : work_(workspace),
        plan_(workspace.plan),
        table_(*workspace.plan.table),
        inputs_(inputs),
        k_(data_view(inputs.k)),
        v_(data_view(inputs.v)) {}

  Status run() noexcept {
    if (plan_.keys.empty()) return {};
    std::memset(work_.base + plan_.layout.poison, 0,
                static_cast<size_t>(plan_.heads() * plan_.seqlen_k));
    if (plan_.smooths_k()) compute_k_means();
    if (plan_.int8_values() && !plan_.fold_v()) compute_v_scales();
    const int64_t first = plan_.keys.lo / kKeyGroup;
    const int64_t groups = key_groups(plan_.keys.hi) - first;
    for_each_task(plan_.context, plan_.heads() * groups,
                  [&](int64_t task, int64_t) { pack_group(task / groups, first + task % groups); });
    for_each_task(plan_.context, plan_.heads(), [&](int64_t head, int64_t) { finish_head(head); });
    if (bad_code_.load(std::memory_order_relaxed) != nullptr) {
      return invalid(bad_code_.load(std::memory_order_relaxed),
                     ".codes holds -128, wants codes in [-127, 127]");
    }
    return {};
  }

 private:
  [[nodiscard]] int64_t batch(int64_t head) const noexcept { return head / plan_.nheads_k; }
  [[nodiscard]] int64_t kv_head(int64_t head) const noexcept { return head % plan_.nheads_k; }
  [[nodiscard]] int dim() const noexcept { return static_cast<int>(plan_.head_dim); }

  void load(const ConstTensorView& view, int64_t head, int64_t key, float* row) const noexcept {
    table_.load_row(element(view, batch(head), key, kv_head(head)), view.dtype, view.strides[3],
                    dim(), row);
  }

  void compute_k_means() noexcept {
    const int64_t keys = plan_.keys.hi - plan_.keys.lo;
    const int64_t chunks = (keys + kMeanChunk - 1) / kMeanChunk;
    auto* sums = work_.at<double>(plan_.layout.k_mean_sums);
    for_each_task(plan_.context, plan_.heads() * chunks, [&](int64_t task, int64_t) {
      const int64_t head = task / chunks;
      const int64_t begin = plan_.keys.lo + task % chunks * kMeanChunk;
      const int64_t end = std::min(begin + kMeanChunk, plan_.keys.hi);
      double* sum = sums + task * dim();
      std::fill_n(sum, dim(), 0.0);
      float row[kMaxDim];
      for (int64_t key = begin; key < end; ++key) {
        load(k_, head, key, row);
        table_.add_to_sums(row, dim(), sum);
      }
    });
    for (int64_t head = 0; head < plan_.heads(); ++head) {
      for (int d = 0; d < dim(); ++d) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += sums[(head * chunks + c) * dim() + d];
        const auto mean = static_cast<float>(sum / static_cast<double>(keys));
        // A NaN or an Inf among the keys poisons its own token below, not the mean of the others.
        work_.k_mean(head)[d] = std::isfinite(mean) ? mean : 0.0f;
      }
    }
  }

  /// Scales of float V for the granularities coarser than a token, or copies the given ones.
  void compute_v_scales() noexcept {
    const int64_t blocks = plan_.kv_blocks();
    const int64_t padded = padded_v_dim(dim());
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.v);
    auto* bits = work_.at<uint32_t>(plan_.layout.v_max_bits);
    if (quantized == nullptr) {
      for_each_task(plan_.context, plan_.heads() * blocks, [&](int64_t task, int64_t) {
        const int64_t head = task / blocks;
        const int64_t start = task % blocks * plan_.options.kv_block;
        const int64_t begin = std::max(start, plan_.keys.lo);
        const int64_t end = std::min(start + plan_.options.kv_block, plan_.keys.hi);
        std::fill_n(bits + task * dim(), dim(), 0u);
        float row[kMaxDim];
        for (int64_t key = begin; key < end; ++key) {
          load(v_, head, key, row);
          table_.max_abs_bits_each(row, dim(), bits + task * dim());
        }
      });
    }
    for (int64_t head = 0; head < plan_.heads(); ++head) {
      float* out_scale = work_.v_out_scale(head);
      float* block_scale = work_.v_block_scale(head);
      std::fill_n(out_scale, padded, 1.0f);
      const uint32_t* head_bits = bits + head * blocks * dim();
      const auto given = [&](int64_t seq, int64_t d) {
        const float scale = float_at(quantized->scale, batch(head), seq, kv_head(head), d);
        return usable(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
      };
      const auto largest = [&](int64_t block_lo, int64_t block_hi, int d_lo, int d_hi) {
        uint32_t most = 0;
        for (int64_t b = block_lo; b < block_hi; ++b) {
          for (int d = d_lo; d < d_hi; ++d) most = std::max(most, head_bits[b * dim() + d]);
        }
        return scale_from_bits(most);
      };
      switch (plan_.v_granularity) {
        case Granularity::kTensor:
          std::fill_n(out_scale, dim(), quantized ? given(0, 0) : largest(0, blocks, 0, dim()));
          break;
        case Granularity::kChannel:
          for (int d = 0; d < dim(); ++d) {
            out_scale[d] = quantized ? given(0, d) : largest(0, blocks, d, d + 1);
          }
          break;
        case Granularity::kBlock:
          for (int64_t b = 0; b < blocks; ++b) {
            block_scale[b] = quantized ? given(b, 0) : largest(b, b + 1, 0, dim());
          }
          break;
        case Granularity::kBlockChannel:
          for (int64_t b = 0; b < blocks; ++b) {
            for (int d = 0; d < padded; ++d) {
              float& scale = block_scale[b * padded + d];
              scale = 0.0f;  // padding does not take part in the largest
              if (d < dim()) scale = quantized ? given(b, d) : largest(b, b + 1, d, d + 1);
            }
          }
          break;
        case Granularity::kToken:
          break;  // folded: finish_head()
      }
    }
  }

  /// Makes the scales of the visible blocks relative to their largest, which scales the output
  /// instead: the sums of a row stay in range whatever the magnitude of V. A NaN stays where it is.
  void take_out_largest(float* block_scale, float* out_scale) const noexcept {
    if (!by_block(plan_.v_granularity)) return;
    const int64_t kv_block = plan_.options.kv_block;
    const int64_t step = work_.v_block_scale_step();
    const int64_t begin = plan_.keys.lo / kv_block * step;
    const int64_t end = (plan_.keys.hi + kv_block - 1) / kv_block * step;
    float reference = 0;
    for (int64_t i = begin; i < end; ++i) reference = std::max(reference, block_scale[i]);
    if (!usable(reference)) return;
    for (int64_t i = begin; i < end; ++i) block_scale[i] /= reference;
    std::fill_n(out_scale, padded_v_dim(dim()), reference);
  }

  void pack_group(int64_t head, int64_t group) noexcept {
    const int64_t first = group * kKeyGroup;
    const int64_t begin = std::max(first, plan_.keys.lo);
    const int64_t end = std::min(first + kKeyGroup, plan_.keys.hi);
    if (plan_.int8_scores()) {
      pack_k_codes(head, group, begin, end);
    } else {
      pack_k_floats(head, group, begin, end);
    }
    if (plan_.int8_values()) {
      pack_v_codes(head, group, begin, end);
    } else {
      pack_v_floats(head, begin, end);
    }
  }

  void pack_k_codes(int64_t head, int64_t group, int64_t begin, int64_t end) noexcept {
    const auto padded = static_cast<int>(padded_qk_dim(dim()));
    alignas(64) int8_t codes[kKeyGroup * kMaxDim];
    std::memset(codes, 0, static_cast<size_t>(kKeyGroup * padded));
    KeyRecord& record = work_.records(head)[group];
    std::fill_n(record.k_scale, kKeyGroup, 0.0f);
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.k);
    for (int64_t key = begin; key < end; ++key) {
      const int64_t slot = key - group * kKeyGroup;
      int8_t* row = codes + slot * padded;
      float scale = 0;
      if (quantized != nullptr) {
        scale = float_at(quantized->scale, batch(head), key, kv_head(head));
        if (load_codes(k_, batch(head), key, kv_head(head), row)) bad_code_ = "k";
      } else {
        float values[kMaxDim];
        load(k_, head, key, values);
        if (plan_.smooths_k()) table_.subtract(values, work_.k_mean(head), dim());
        const uint32_t bits = table_.max_abs_bits(values, dim());
        scale = scale_from_bits(bits);
        if (!codes_are_zero(bits)) table_.encode(values, dim(), &scale, 0, row);
      }
      if (!usable(scale)) {
        work_.poison(head)[key] = 1;
        scale = 0;
      }
      record.k_scale[slot] = std::min(scale, kMaxKeyScale);
    }
    table_.pack_k(codes, padded, padded, work_.k(head) + group * kKeyGroup * padded,
                  record.correction);
  }

  void pack_v_codes(int64_t head, int64_t group, int64_t begin, int64_t end) noexcept {
    const auto padded = static_cast<int>(padded_v_dim(dim()));
    alignas(64) int8_t codes[kKeyGroup * kMaxDim];
    std::memset(codes, 0, static_cast<size_t>(kKeyGroup * padded));
    KeyRecord& record = work_.records(head)[group];
    std::fill_n(record.log2_ratio, kKeyGroup, 0.0f);
    std::fill_n(record.inv_ratio, kKeyGroup, 1.0f);
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.v);
    for (int64_t key = begin; key < end; ++key) {
      const int64_t slot = key - group * kKeyGroup;
      int8_t* row = codes + slot * padded;
      if (quantized != nullptr) {
        if (load_codes(v_, batch(head), key, kv_head(head), row)) bad_code_ = "v";
      }
      if (!plan_.fold_v()) {
        if (quantized == nullptr) encode_v_coarse(head, key, row);
        continue;
      }
      float scale = 0;
      bool zero = false;
      if (quantized != nullptr) {
        scale = float_at(quantized->scale, batch(head), key, kv_head(head));
        zero = std::all_of(row, row + dim(), [](int8_t code) { return code == 0; });
      } else {
        float values[kMaxDim];
        load(v_, head, key, values);
        const uint32_t bits = table_.max_abs_bits(values, dim());
        scale = scale_from_bits(bits);
        zero = codes_are_zero(bits);
        if (!zero) table_.encode(values, dim(), &scale, 0, row);
      }
      if (!usable(scale)) {
        work_.poison(head)[key] = 1;
        std::memset(row, 0, static_cast<size_t>(dim()));
        zero = true;
      }
      // The scale itself for now, 0 for a token of zeros: finish_head() needs the largest first.
      record.inv_ratio[slot] = zero ? 0.0f : scale;
    }
    std::byte* packed = work_.v(head) + group * kKeyGroup * padded;
    table_.pack_v(codes, padded, padded, packed);
    table_.sum_v(packed, padded, work_.v_sums(head) + group * padded);
  }

  void encode_v_coarse(int64_t head, int64_t key, int8_t* row) const noexcept {
    float values[kMaxDim];
    load(v_, head, key, values);
    const int64_t block = key / plan_.options.kv_block;
    const bool per_channel = by_channel(plan_.v_granularity);
    const float* scale = by_block(plan_.v_granularity)
                             ? work_.v_block_scale(head) + block * work_.v_block_scale_step()
                             : work_.v_out_scale(head);
    for (int d = 0; d < dim(); ++d) {
      // The scale's NaN reaches the output; the codes stay clean.
      if (std::isnan(scale[per_channel ? d : 0])) values[d] = 0;
    }
    const float one = 1.0f;
    const bool whole_nan = !per_channel && std::isnan(scale[0]);
    table_.encode(values, dim(), whole_nan ? &one : scale, per_channel ? 1 : 0, row);
    for (int d = 0; per_channel && d < dim(); ++d) {
      if (std::isnan(scale[d])) row[d] = 0;
    }
  }

  void pack_k_floats(int64_t head, int64_t group, int64_t begin, int64_t end) noexcept {
    auto* out = reinterpret_cast<float*>(work_.k(head)) + group * kKeyGroup * dim();
    std::fill_n(out, kKeyGroup * dim(), 0.0f);  // [head_dim][64]
    float values[kMaxDim];
    for (int64_t key = begin; key < end; ++key) {
      load(k_, head, key, values);
      float* column = out + (key - group * kKeyGroup);
      for (int d = 0; d < dim(); ++d) column[d * kKeyGroup] = values[d];
    }
  }

  void pack_v_floats(int64_t head, int64_t begin, int64_t end) noexcept {
    const bool half = plan_.options.mode == Mode::kHalf;
    const int64_t padded = padded_v_dim(dim());
    float values[kMaxDim] = {};
    for (int64_t key = begin; key < end; ++key) {
      load(v_, head, key, values);
      // The rows of a tile share what they read: a weight of 0 times a NaN would reach rows that do
      // not see this key.
      if (table_.max_abs_bits(values, dim()) >= kInfBits) {
        work_.poison(head)[key] = 1;
        std::fill_n(values, dim(), 0.0f);
      }
      std::byte* row = work_.v(head) + key * padded * (half ? 2 : 4);  // [padded_v_dim]
      table_.store_row(values, static_cast<int>(padded), half ? DType::kBFloat16 : DType::kFloat32,
                       1, row);
    }
  }

  /// What needs all keys of a head: relative V scales, and whether anything is poisoned.
  void finish_head(int64_t head) noexcept {
    const uint8_t* poison = work_.poison(head);
    work_.head_poisoned(head) =
        std::memchr(poison + plan_.keys.lo, 1,
                    static_cast<size_t>(plan_.keys.hi - plan_.keys.lo)) != nullptr;
    if (plan_.fold_v()) fold_v_scales(head);
    if (plan_.int8_values()) {
      take_out_largest(work_.v_block_scale(head), work_.v_out_scale(head));
      compute_v_means(head);
    }
  }

  /// Mean V codes of each kv block, over the keys that some query sees.
  void compute_v_means(int64_t head) noexcept {
    const int64_t padded = padded_v_dim(dim());
    const int64_t kv_block = plan_.options.kv_block;
    for (int64_t block = plan_.keys.lo / kv_block; block * kv_block < plan_.keys.hi; ++block) {
      const int64_t begin = std::max(block * kv_block, plan_.keys.lo);
      const int64_t end = std::min((block + 1) * kv_block, plan_.keys.hi);
      float* mean = work_.v_mean(head) + block * padded;
      for (int64_t d = 0; d < padded; ++d) {
        int64_t sum = 0;
        for (int64_t group = begin / kKeyGroup; group < key_groups(end); ++group) {
          sum += work_.v_sums(head)[group * padded + d];
        }
        mean[d] = static_cast<float>(sum) / static_cast<float>(end - begin);
      }
    }
  }

  void fold_v_scales(int64_t head) noexcept {
    KeyRecord* records = work_.records(head);
    const auto scale_of = [&](int64_t key) -> float& {
      return records[key / kKeyGroup].inv_ratio[key % kKeyGroup];
    };
    float reference = 0;
    for (int64_t key = plan_.keys.lo; key < plan_.keys.hi; ++key) {
      reference = std::max(reference, scale_of(key));
    }
    if (reference == 0) reference = 1.0f;
    float* out_scale = work_.v_out_scale(head);
    std::fill_n(out_scale, padded_v_dim(dim()), reference);
    const int64_t kv_block = plan_.options.kv_block;
    for (int64_t start = plan_.keys.lo / kv_block * kv_block; start < plan_.keys.hi;
         start += kv_block) {
      const int64_t begin = std::max(start, plan_.keys.lo);
      const int64_t end = std::min(start + kv_block, plan_.keys.hi);
      float largest = 0;
      for (int64_t key = begin; key < end; ++key) largest = std::max(largest, scale_of(key));
      const float zero_ratio = std::max(
          kMinRatio, largest > 0 ? largest / reference * kZeroTokenRatio : kZeroTokenRatio);
      for (int64_t group = begin / kKeyGroup; group < key_groups(end); ++group) {
        KeyRecord& record = records[group];
        const int64_t lo = std::max(begin, group * kKeyGroup) - group * kKeyGroup;
        const int64_t hi = std::min(end, (group + 1) * kKeyGroup) - group * kKeyGroup;
        for (int64_t slot = lo; slot < hi; ++slot) {
          const float scale = record.inv_ratio[slot];
          const float ratio = scale == 0 ? zero_ratio : std::max(kMinRatio, scale / reference);
          record.log2_ratio[slot] = static_cast<float>(std::log2(static_cast<double>(ratio)));
          record.inv_ratio[slot] = 1.0f / ratio;
        }
      }
    }
  }

  const Workspace& work_;
  const AttentionPlan::State& plan_;
  const KernelTable& table_;
  const AttentionInputs& inputs_;
  const ConstTensorView& k_;
  const ConstTensorView& v_;
  std::atomic<const char*> bad_code_ = nullptr;
};

}  // namespace

bool load_codes(const ConstTensorView& codes, int64_t batch, int64_t seq, int64_t head,
                int8_t* row) noexcept {
  const auto* source = reinterpret_cast<const int8_t*>(element(codes, batch, seq, head));
  const int64_t stride = codes.strides[3];
  bool bad = false;
  for (int64_t d = 0; d < codes.shape[3]; ++d) {
    row[d] = source[d * stride];
    bad = bad || row[d] == -128;
  }
  return bad;
}

Status prepare(const Workspace& workspace, const AttentionInputs& inputs) noexcept {
  return Preparation(workspace, inputs).run();
}

}  // namespace attn8::cpu
