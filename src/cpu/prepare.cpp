// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "core/element.hpp"
#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "cpu/run.hpp"

namespace attn8::cpu {
namespace {

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
    for (int64_t head = 0; head < plan_.heads(); ++head) begin_head(head);
    if (plan_.smooths_k()) compute_k_means();
    if (plan_.int8_values()) prepare_v_scales();
    for_each_block([this](int64_t head, int64_t block) { pack_block(head, block); });
    for (int64_t head = 0; head < plan_.heads(); ++head) finish_head(head);
    if (bad_code_.load(std::memory_order_relaxed) != nullptr) {
      return invalid(bad_code_.load(std::memory_order_relaxed),
                     ".codes holds -128, wants codes in [-127, 127]");
    }
    return {};
  }

 private:
  /// head counts (sequence, kv head) pairs.
  [[nodiscard]] const SequenceKeys& sequence(int64_t head) const noexcept {
    return work_.sequence_keys()[static_cast<size_t>(head / plan_.nheads_k)];
  }
  [[nodiscard]] int64_t batch(int64_t head) const noexcept { return sequence(head).batch; }
  [[nodiscard]] int64_t kv_head(int64_t head) const noexcept { return head % plan_.nheads_k; }
  /// Where a key of a head lies in k and v.
  [[nodiscard]] int64_t token(int64_t head, int64_t key) const noexcept {
    return sequence(head).first_key + key;
  }

  /// Calls body(head, i) for i in [0, counts of its sequence), from all threads. `slot`: those
  /// counts added up over the sequences before each.
  template <class Body>
  void for_each_part(int64_t SequenceKeys::*slot, int64_t SequenceKeys::*counts,
                     const Body& body) const noexcept {
    const std::span<const SequenceKeys> all = work_.sequence_keys();
    const int64_t total = all.back().*slot + all.back().*counts;
    for_each_task(plan_.context, total * plan_.nheads_k, [&](int64_t task, int64_t) {
      const auto after = std::upper_bound(
          all.begin(), all.end(), task / plan_.nheads_k,
          [slot](int64_t part, const SequenceKeys& keys) { return part < keys.*slot; });
      const SequenceKeys& keys = *(after - 1);
      const int64_t part = task - keys.*slot * plan_.nheads_k;
      body((after - 1 - all.begin()) * plan_.nheads_k + part / (keys.*counts),
           part % (keys.*counts));
    });
  }
  /// Calls body(head, block) for the blocks with keys that some query sees.
  template <class Body>
  void for_each_block(const Body& body) const noexcept {
    for_each_part(&SequenceKeys::block_slot, &SequenceKeys::blocks,
                  [&](int64_t head, int64_t i) { body(head, sequence(head).first_block + i); });
  }
  [[nodiscard]] BlockMemory block_memory(int64_t head, int64_t block) const noexcept {
    return work_.block_memory(sequence(head), kv_head(head), block);
  }
  [[nodiscard]] int64_t last_block(int64_t head) const noexcept {
    return sequence(head).first_block + sequence(head).blocks;
  }
  /// Channels of K, of V, and of both as packed.
  [[nodiscard]] int dim() const noexcept { return static_cast<int>(plan_.head_dim); }
  [[nodiscard]] int dim_v() const noexcept { return static_cast<int>(plan_.head_dim_v); }
  [[nodiscard]] int padded() const noexcept {
    return static_cast<int>(padded_dim(plan_.packed_dim()));
  }

  void load(const ConstTensorView& view, int64_t head, int64_t key, float* row) const noexcept {
    table_.load_row(element(view, batch(head), token(head, key), kv_head(head)), view.dtype,
                    view.strides[3], static_cast<int>(view.shape[3]), row);
  }

  /// Tokens of a head as the kernels take them.
  [[nodiscard]] RowSpan rows(const ConstTensorView& view, int64_t head,
                             KeyRange keys) const noexcept {
    return token_rows(view, batch(head), token(head, keys.lo), keys.hi - keys.lo, kv_head(head), 0,
                      view.shape[3]);
  }

  void begin_head(int64_t head) const noexcept {
    PackedBlock* blocks = work_.packed_blocks(sequence(head), kv_head(head));
    for (int64_t b = sequence(head).first_block; b < last_block(head); ++b) {
      const BlockMemory memory = block_memory(head, b);
      blocks[b] = {memory.data, memory.header_data};
    }
    PackedHead& packed = work_.head(head);
    packed = {};
    packed.kv.blocks = blocks;
    packed.kv.layout = plan_.layout.block;
    packed.kv.keys = sequence(head).visible;
    packed.kv.channel_scale = plan_.v_granularity == Granularity::kBlockChannel;
    if (plan_.int8_values()) packed.v_out_scale = work_.v_out_scale(head);
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.k);
    if (quantized != nullptr && quantized->mean.has_value()) {
      for (int64_t d = 0; d < dim(); ++d) {
        work_.k_mean(head)[d] = float_at(*quantized->mean, batch(head), 0, kv_head(head), d);
      }
      packed.k_mean = work_.k_mean(head);
    } else if (plan_.smooths_k()) {
      packed.k_mean = work_.k_mean(head);
    }
  }

  void compute_k_means() noexcept {
    const auto sums_of = [this](int64_t head) {
      const SequenceKeys& keys = sequence(head);
      return work_.at<double>(plan_.layout.k_mean_sums) +
             (keys.chunk_slot * plan_.nheads_k + kv_head(head) * keys.chunks) * dim();
    };
    for_each_part(&SequenceKeys::chunk_slot, &SequenceKeys::chunks,
                  [&](int64_t head, int64_t chunk) {
                    const KeyRange range = sequence(head).visible;
                    const int64_t begin = range.lo + chunk * kMeanChunk;
                    const int64_t end = std::min(begin + kMeanChunk, range.hi);
                    double* sum = sums_of(head) + chunk * dim();
                    std::fill_n(sum, dim(), 0.0);
                    table_.add_rows(rows(k_, head, {begin, end}), sum);
                  });
    for (int64_t head = 0; head < plan_.heads(); ++head) {
      const KeyRange range = sequence(head).visible;
      mean_of_chunks(sums_of(head), range.hi - range.lo, dim(), work_.k_mean(head));
    }
  }

  /// v_out_scale, and what the scales of V need of all keys of a head before any is encoded.
  void prepare_v_scales() noexcept {
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.v);
    const bool tensor = plan_.v_granularity == Granularity::kTensor;
    const bool channel = plan_.v_granularity == Granularity::kChannel;
    if ((tensor || channel) && quantized == nullptr) measure_v();
    for (int64_t head = 0; head < plan_.heads(); ++head) {
      float* scale = work_.v_out_scale(head);
      std::fill_n(scale, padded(), 1.0f);
      if (!tensor && !channel) continue;
      uint32_t most = 0;
      for (int d = 0; d < dim_v(); ++d) {
        if (quantized != nullptr) {
          scale[d] = given_scale(quantized->scale, head, 0, channel ? d : 0);
          continue;
        }
        const uint32_t bits = largest_of_channel(head, d);
        most = std::max(most, bits);
        scale[d] = scale_from_bits(bits);
      }
      if (tensor && quantized == nullptr) std::fill_n(scale, dim_v(), scale_from_bits(most));
    }
  }

  [[nodiscard]] float given_scale(const ConstTensorView& scales, int64_t head, int64_t seq,
                                  int64_t d) const noexcept {
    const float scale = float_at(scales, batch(head), seq, kv_head(head), d);
    return usable(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
  }

  /// Bits of the largest magnitudes of V, by block and channel.
  void measure_v() noexcept {
    for_each_block([this](int64_t head, int64_t block) {
      const KeyRange keys = keys_of_block(head, block);
      uint32_t* bits = v_max_bits(head, block);
      std::fill_n(bits, dim_v(), 0u);
      float row[kMaxDim];
      for (int64_t key = keys.lo; key < keys.hi; ++key) {
        load(v_, head, key, row);
        table_.max_abs_bits_each(row, dim_v(), bits);
      }
    });
  }

  [[nodiscard]] uint32_t* v_max_bits(int64_t head, int64_t block) const noexcept {
    return work_.at<uint32_t>(plan_.layout.v_max_bits) +
           work_.block_index(sequence(head), kv_head(head), block) * dim_v();  // [head_dim_v]
  }

  [[nodiscard]] uint32_t largest_of_channel(int64_t head, int d) const noexcept {
    uint32_t most = 0;
    for (int64_t b = sequence(head).first_block; b < last_block(head); ++b) {
      most = std::max(most, v_max_bits(head, b)[d]);
    }
    return most;
  }

  /// The keys of a block that some query sees.
  [[nodiscard]] KeyRange keys_of_block(int64_t head, int64_t block) const noexcept {
    const int64_t kv_block = plan_.options.kv_block;
    const KeyRange keys = sequence(head).visible;
    return {std::max(block * kv_block, keys.lo), std::min((block + 1) * kv_block, keys.hi)};
  }

  void pack_block(int64_t head, int64_t index) noexcept {
    const KeyRange keys = keys_of_block(head, index);
    const BlockMemory block = block_memory(head, index);
    clear_header(block, plan_.options.kv_block);
    const int64_t first = index * plan_.options.kv_block;
    VScales scales;
    if (plan_.int8_values()) scale_v(head, index, keys, block, scales);
    int64_t v_sums[kMaxDim] = {};
    for (int64_t group = (keys.lo - first) / kKeyGroup; group < key_groups(keys.hi - first);
         ++group) {
      const int64_t group_first = first + group * kKeyGroup;
      const KeyRange range = {std::max(keys.lo, group_first),
                              std::min(keys.hi, group_first + kKeyGroup)};
      if (plan_.int8_scores()) {
        pack_k_codes(head, group, group_first, range, block);
      } else {
        pack_k_floats(head, group_first, range, block.k(group));
      }
      if (plan_.int8_values()) {
        fold_v(scales, group * kKeyGroup, {range.lo - first, range.hi - first}, block);
        pack_v_codes(head, group, group_first, range, scales, block, v_sums);
      } else {
        pack_v_floats(head, group, group_first, range, block);
      }
    }
    if (plan_.int8_values()) {
      store_mean(block, v_sums, keys.hi - keys.lo, padded());
    }
  }

  /// How the V of a block is encoded.
  struct VScales {
    /// Granularity kToken: the scale of each token, 0 for one whose codes are zeros.
    alignas(64) std::array<float, kMaxKvBlock> token;
    const float* shared = nullptr;  ///< otherwise: of all channels, or the first of [head_dim]
    float block = 1;                ///< v_block of docs/numerics.md
  };

  void scale_v(int64_t head, int64_t index, KeyRange keys, const BlockMemory& block,
               VScales& scales) noexcept {
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.v);
    BlockHeader& header = block.header();
    float* channel_scale = block.channel_scale();
    switch (plan_.v_granularity) {
      case Granularity::kTensor:
      case Granularity::kChannel:
        scales.shared = work_.v_out_scale(head);
        break;
      case Granularity::kBlock:
        if (quantized != nullptr) {
          header.v_scale = given_scale(quantized->scale, head, index, 0);
        } else {
          uint32_t bits = 0;
          float row[kMaxDim];
          for (int64_t key = keys.lo; key < keys.hi; ++key) {
            load(v_, head, key, row);
            bits = std::max(bits, table_.max_abs_bits(row, dim_v()));
          }
          header.v_scale = scale_from_bits(bits);
        }
        scales.shared = &header.v_scale;
        break;
      case Granularity::kBlockChannel: {
        std::fill_n(channel_scale, padded(), 1.0f);
        uint32_t bits[kMaxDim] = {};
        float row[kMaxDim];
        for (int64_t key = keys.lo; quantized == nullptr && key < keys.hi; ++key) {
          load(v_, head, key, row);
          table_.max_abs_bits_each(row, dim_v(), bits);
        }
        for (int d = 0; d < dim_v(); ++d) {
          channel_scale[d] = quantized != nullptr ? given_scale(quantized->scale, head, index, d)
                                                  : scale_from_bits(bits[d]);
        }
        scales.shared = channel_scale;
        break;
      }
      case Granularity::kToken:
        encode_v_tokens(head, index * plan_.options.kv_block, keys, block, scales);
        header.v_scale = scales.block;
        break;
    }
  }

  /// Where the codes of a V token of granularity kToken lie, row by row, until their group is
  /// packed in their place.
  [[nodiscard]] int8_t* v_row(const BlockMemory& block, int64_t key) const noexcept {
    return reinterpret_cast<int8_t*>(block.v(0)) + key * padded();
  }

  void encode_v_tokens(int64_t head, int64_t first, KeyRange keys, const BlockMemory& block,
                       VScales& scales) noexcept {
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.v);
    scales.token.fill(0.0f);
    uint32_t bits[kMaxKvBlock];
    if (dim_v() < padded()) {
      std::memset(v_row(block, keys.lo - first), 0,
                  static_cast<size_t>((keys.hi - keys.lo) * padded()));
    }
    if (quantized == nullptr) {
      table_.quantize_rows(rows(v_, head, keys), nullptr, v_row(block, keys.lo - first), padded(),
                           bits);
    }
    float largest = 0;
    for (int64_t key = keys.lo; key < keys.hi; ++key) {
      int8_t* row = v_row(block, key - first);
      float scale = 0;
      bool zero = false;
      if (quantized != nullptr) {
        scale = float_at(quantized->scale, batch(head), token(head, key), kv_head(head));
        if (load_codes(v_, batch(head), token(head, key), kv_head(head), row)) bad_code_ = "v";
        zero = std::all_of(row, row + dim_v(), [](int8_t code) { return code == 0; });
      } else {
        scale = scale_from_bits(bits[key - keys.lo]);
        zero = codes_are_zero(bits[key - keys.lo]);
      }
      if (!usable(scale)) {
        block.mark_poisoned(key - first);
        std::memset(row, 0, static_cast<size_t>(dim_v()));
        zero = true;
      }
      if (zero) continue;
      scales.token[static_cast<size_t>(key - first)] = scale;
      largest = std::max(largest, scale);
    }
    if (largest > 0) scales.block = largest;
  }

  /// g and W of the keys of the group that starts at key `first` of the block.
  void fold_v(const VScales& scales, int64_t first, KeyRange keys,
              const BlockMemory& block) const noexcept {
    for (int64_t key = first; key < first + kKeyGroup; ++key) {
      const bool counts = plan_.fold_v() && key >= keys.lo && key < keys.hi;
      fold_key(block, key,
               counts ? fold_ratio(scales.token[static_cast<size_t>(key)], scales.block) : 1.0f);
    }
  }

  void pack_k_codes(int64_t head, int64_t group, int64_t first, KeyRange keys,
                    const BlockMemory& block) noexcept {
    alignas(64) int8_t codes[kKeyGroup * kMaxDim];
    std::memset(codes, 0, static_cast<size_t>(kKeyGroup * padded()));
    float k_scale[kKeyGroup] = {};
    uint32_t bits[kKeyGroup];
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.k);
    if (quantized == nullptr) {
      table_.quantize_rows(rows(k_, head, keys), plan_.smooths_k() ? work_.k_mean(head) : nullptr,
                           codes + (keys.lo - first) * padded(), padded(), bits);
    }
    for (int64_t key = keys.lo; key < keys.hi; ++key) {
      float scale = 0;
      if (quantized != nullptr) {
        int8_t* row = codes + (key - first) * padded();
        scale = float_at(quantized->scale, batch(head), token(head, key), kv_head(head));
        if (load_codes(k_, batch(head), token(head, key), kv_head(head), row)) bad_code_ = "k";
      } else {
        scale = scale_from_bits(bits[key - keys.lo]);
      }
      if (!usable(scale)) block.mark_poisoned(key - first + group * kKeyGroup);
      k_scale[key - first] = record_scale(scale);
    }
    pack_k_group(table_, block, group, codes, k_scale, padded());
  }

  void pack_v_codes(int64_t head, int64_t group, int64_t first, KeyRange keys,
                    const VScales& scales, const BlockMemory& block, int64_t* sums) noexcept {
    alignas(64) int8_t codes[kKeyGroup * kMaxDim];
    std::memset(codes, 0, static_cast<size_t>(kKeyGroup * padded()));
    const bool quantized = std::holds_alternative<QuantizedView>(inputs_.v);
    const int64_t block_first = first - group * kKeyGroup;
    if (plan_.fold_v()) {
      std::memcpy(codes + (keys.lo - first) * padded(), v_row(block, keys.lo - block_first),
                  static_cast<size_t>((keys.hi - keys.lo) * padded()));
    }
    for (int64_t key = keys.lo; key < keys.hi; ++key) {
      int8_t* row = codes + (key - first) * padded();
      if (plan_.fold_v()) {
        const float scale = scales.token[static_cast<size_t>(key - block_first)];
        if (scale > 0 && scale / scales.block < kMinRatio) [[unlikely]]
          shrink_codes(row, dim_v(), scale / scales.block);
      } else if (!quantized) {
        encode_v_shared(head, key, scales.shared, row);
      } else if (load_codes(v_, batch(head), token(head, key), kv_head(head), row)) {
        bad_code_ = "v";
      }
    }
    pack_v_group(table_, block, group, codes, padded(), sums);
  }

  /// V of the granularities coarser than a token.
  void encode_v_shared(int64_t head, int64_t key, const float* scale, int8_t* row) const noexcept {
    float values[kMaxDim];
    load(v_, head, key, values);
    const bool per_channel = by_channel(plan_.v_granularity);
    // The scale's NaN reaches the output; the codes stay clean.
    float usable_scale[kMaxDim];
    for (int d = 0; d < dim_v(); ++d) {
      usable_scale[d] = scale[per_channel ? d : 0];
      if (!std::isnan(usable_scale[d])) continue;
      usable_scale[d] = 1;
      values[d] = 0;
    }
    table_.encode(values, dim_v(), usable_scale, 1, row);
  }

  void pack_k_floats(int64_t head, int64_t first, KeyRange keys, std::byte* packed) noexcept {
    std::memset(packed, 0, plan_.layout.block.k_group_bytes);
    float values[kMaxDim];
    for (int64_t key = keys.lo; key < keys.hi; ++key) {
      load(k_, head, key, values);
      if (plan_.exact_bfloat16()) {
        auto* column = reinterpret_cast<uint16_t*>(packed) + 2 * (key - first);
        for (int d = 0; d < dim(); ++d) {  // [padded_dim / 2][64][2]
          column[d / 2 * 2 * kKeyGroup + d % 2] = float_to_bfloat16(values[d]);
        }
      } else {
        float* column = reinterpret_cast<float*>(packed) + (key - first);
        for (int d = 0; d < dim(); ++d) column[d * kKeyGroup] = values[d];  // [head_dim][64]
      }
    }
  }

  void pack_v_floats(int64_t head, int64_t group, int64_t first, KeyRange keys,
                     const BlockMemory& block) noexcept {
    const bool pairs = plan_.options.mode == Mode::kHalf || plan_.exact_bfloat16();
    std::byte* packed = block.v(group);
    float values[kMaxDim] = {};
    // The other key of a pair may be one that no query sees.
    if (pairs) std::memset(packed, 0, plan_.layout.block.v_group_bytes);
    for (int64_t key = keys.lo; key < keys.hi; ++key) {
      load(v_, head, key, values);
      // The rows of a tile share what they read: a weight of 0 times a NaN would reach rows that do
      // not see this key.
      if (table_.max_abs_bits(values, dim_v()) >= kInfBits) {
        block.mark_poisoned(key - first + group * kKeyGroup);
        std::fill_n(values, dim_v(), 0.0f);
      }
      const int64_t slot = key - first;
      if (pairs) {
        auto* row = reinterpret_cast<uint16_t*>(packed) + slot / 2 * 2 * padded() + slot % 2;
        for (int d = 0; d < dim_v(); ++d) row[2 * d] = float_to_bfloat16(values[d]);
      } else {
        std::memcpy(packed + slot * padded() * 4, values, static_cast<size_t>(padded()) * 4);
      }
    }
  }

  /// What needs all blocks of a head.
  void finish_head(int64_t head) noexcept {
    PackedHead& packed = work_.head(head);
    float largest = 0;  // of the V scales; comparisons leave a NaN where it is
    for (int64_t b = sequence(head).first_block; b < last_block(head); ++b) {
      const BlockMemory block = block_memory(head, b);
      const BlockHeader& header = block.header();
      packed.kv.key_norm = std::max(packed.kv.key_norm, header.key_norm);
      packed.poisoned = packed.poisoned || header.poisoned != 0;
      if (plan_.v_granularity != Granularity::kBlockChannel) {
        largest = std::max(largest, header.v_scale);
        continue;
      }
      for (int d = 0; d < dim_v(); ++d) largest = std::max(largest, block.channel_scale()[d]);
    }
    if (!plan_.int8_values()) return;
    if (usable(largest)) packed.kv.v_ref = largest;
    if (plan_.fold_v() || by_block(plan_.v_granularity)) {
      std::fill_n(work_.v_out_scale(head), padded(), packed.kv.v_ref);
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

Status prepare(const Workspace& workspace, const AttentionInputs& inputs) noexcept {
  return Preparation(workspace, inputs).run();
}

}  // namespace attn8::cpu
