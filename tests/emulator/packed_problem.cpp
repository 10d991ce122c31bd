// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/packed_problem.hpp"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <random>

#include "cuda/pack_v.hpp"
#include "emulator/float16.hpp"

namespace attn8::cuda::testing {
namespace {

float value_of(uint16_t bits) { return emulator::half_value(bits); }

float scale_of(float amax) {
  if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
  const float scale = std::bit_cast<float>(std::bit_cast<uint32_t>(amax / 127.0f) & ~uint32_t{7});
  return scale < FLT_MIN ? 1.0f : scale;
}

int8_t code_of(float x, float scale) {
  return std::isnan(scale) ? int8_t{0} : static_cast<int8_t>(std::nearbyint(x / scale));
}

/// Largest magnitude; infinity when one is NaN.
float magnitude(float a, float b) {
  return std::isnan(b) ? std::numeric_limits<float>::infinity() : std::max(a, std::fabs(b));
}

}  // namespace

float Shape::added(int head, int row, int key) {
  if ((row * 7 + key * 3 + head * 5) % 5 == 0) return -INFINITY;
  return 0.25f * static_cast<float>((row + 2 * key + head) % 7) - 0.5f;
}
int Shape::position_offset(int b) const {
  return q_offset + (top_left ? 0 : seqlen_of(b) - seqlen_q);
}
int Shape::first_offset() const {
  return window_left < 0 ? -kNoLimit : position_offset() - window_left;
}
int Shape::last_offset() const {
  const int right = causal ? 0 : window_right;
  return right < 0 ? kNoLimit : position_offset() + right;
}
bool Shape::sees(int row, int key, int b) const {
  const int p = row + position_offset(b);
  return key < seqlen_of(b) && key >= leftpad_of(b) && (!causal || key <= p) &&
         (window_left < 0 || key >= p - window_left) &&
         (window_right < 0 || key <= p + window_right);
}
std::pair<int, int> Shape::visible_keys(int b) const {
  int first = seqlen_k;
  int last = 0;
  for (int i = 0; i < seqlen_q; ++i) {
    for (int j = 0; j < seqlen_k; ++j) {
      if (!sees(i, j, b)) continue;
      first = std::min(first, j);
      last = std::max(last, j + 1);
    }
  }
  return {std::min(first, last), last};
}

Inputs random_inputs(const Shape& s, unsigned seed, float q_size) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  Inputs inputs{s, {}, {}, {}};
  inputs.q.resize(static_cast<size_t>(s.batch) * s.seqlen_q * s.nheads_q * s.head_dim);
  inputs.k.resize(static_cast<size_t>(s.batch) * s.seqlen_k * s.nheads_k * s.head_dim);
  inputs.v.resize(inputs.k.size());
  for (uint16_t& x : inputs.q) x = emulator::half_bits(q_size * normal(generator));
  for (uint16_t& x : inputs.k) x = emulator::half_bits(normal(generator) + 0.5f);
  for (size_t token = 0; token < inputs.v.size() / s.head_dim; ++token) {
    const float size = std::exp2(normal(generator));
    for (int d = 0; d < s.head_dim; ++d) {
      inputs.v[token * s.head_dim + d] = emulator::half_bits(size * normal(generator));
    }
  }
  return inputs;
}

Quantized quantize(const Inputs& inputs, Weights weights, bool smooth_k, int kv_block) {
  const Shape& s = inputs.shape;
  const int dim = s.head_dim;
  Quantized z;
  z.q.resize(inputs.q.size());
  z.k.resize(inputs.k.size());
  z.v.resize(inputs.v.size());
  z.v_half.resize(inputs.v.size());
  for (size_t i = 0; i < inputs.v.size(); ++i) {
    z.v_half[i] = emulator::bfloat16_bits(value_of(inputs.v[i]));
  }
  z.q_scale.resize(inputs.q.size() / dim);
  z.k_scale.resize(inputs.k.size() / dim);
  z.v_token_scale.assign(inputs.v.size() / dim, 0.0f);
  z.ratio.assign(inputs.v.size() / dim, 1.0f);
  z.v_scale.resize(static_cast<size_t>(s.batch) * s.nheads_k * dim);
  z.k_mean.assign(z.v_scale.size(), 0.0f);
  for (size_t token = 0; token < z.q_scale.size(); ++token) {
    float amax = 0;
    for (int d = 0; d < dim; ++d) amax = magnitude(amax, value_of(inputs.q[token * dim + d]));
    z.q_scale[token] = scale_of(amax);
    for (int d = 0; d < dim; ++d) {
      z.q[token * dim + d] = code_of(value_of(inputs.q[token * dim + d]), z.q_scale[token]);
    }
  }
  for (int b = 0; b < s.batch; ++b) {
    const auto [first, last] = s.visible_keys(b);
    for (int h = 0; h < s.nheads_k; ++h) {
      const auto token_of = [&](int j) {
        return (static_cast<size_t>(b) * s.seqlen_k + j) * s.nheads_k + h;
      };
      const size_t head = (static_cast<size_t>(b) * s.nheads_k + h) * dim;
      for (int d = 0; d < dim && smooth_k && first < last; ++d) {
        double sum = 0;
        for (int j = first; j < last; ++j) sum += value_of(inputs.k[token_of(j) * dim + d]);
        z.k_mean[head + d] = static_cast<float>(sum / (last - first));
      }
      std::vector<float> channel(dim, 0.0f);
      float reference = 0;
      for (int j = 0; j < s.seqlen_k; ++j) {
        const size_t token = token_of(j);
        float k_amax = 0;
        float v_amax = 0;
        for (int d = 0; d < dim; ++d) {
          k_amax = magnitude(k_amax, value_of(inputs.k[token * dim + d]) - z.k_mean[head + d]);
          const float v = value_of(inputs.v[token * dim + d]);
          v_amax = magnitude(v_amax, v);
          if (j >= first && j < last) channel[d] = magnitude(channel[d], v);
        }
        z.k_scale[token] = scale_of(k_amax);
        for (int d = 0; d < dim; ++d) {
          z.k[token * dim + d] =
              code_of(value_of(inputs.k[token * dim + d]) - z.k_mean[head + d], z.k_scale[token]);
        }
        z.v_token_scale[token] = v_amax == 0 ? 0.0f : scale_of(v_amax);
        if (j >= first && j < last && z.v_token_scale[token] > reference) {
          reference = z.v_token_scale[token];
        }
      }
      if (reference == 0) reference = 1;
      if (weights == Weights::kPaper) {
        float all = 0;
        for (const float x : channel) all = magnitude(all, x);
        std::fill(channel.begin(), channel.end(), all);
      }
      for (int d = 0; d < dim; ++d) {
        z.v_scale[head + d] = weights == Weights::kFolded ? reference
                              : weights == Weights::kHalf ? 1.0f
                                                          : scale_of(channel[d]);
      }
      for (int j = 0; j < s.seqlen_k; ++j) {
        const size_t token = token_of(j);
        for (int d = 0; d < dim; ++d) {
          const float scale = weights != Weights::kFolded      ? z.v_scale[head + d]
                              : z.v_token_scale[token] == 0.0f ? 1.0f
                                                               : z.v_token_scale[token];
          if (weights == Weights::kHalf) continue;
          z.v[token * dim + d] = code_of(value_of(inputs.v[token * dim + d]), scale);
        }
        if (weights != Weights::kFolded) continue;
        float largest = 0;
        for (int other = j / kv_block * kv_block;
             other < std::min(s.seqlen_k, (j / kv_block + 1) * kv_block); ++other) {
          if (other < first || other >= last) continue;
          const float ratio = z.v_token_scale[token_of(other)] / reference;
          if (ratio > largest) largest = ratio;
        }
        if (largest == 0) largest = 1;
        z.ratio[token] =
            z.v_token_scale[token] == 0 ? largest * 0x1p-20f : z.v_token_scale[token] / reference;
        if (z.ratio[token] < 0x1p-100f) z.ratio[token] = 0x1p-100f;
      }
    }
  }
  return z;
}

Packed pack(const Inputs& inputs, const Quantized& z, Weights weights, int group) {
  const Shape& s = inputs.shape;
  const int dim = s.head_dim;
  const int row_bytes = packed_row_bytes(dim);
  const int packed_dim = packed_head_dim(dim);
  Packed p;
  p.rows_q = static_cast<int>(round_up(s.seqlen_q * group, kSequencePad));
  p.rows_k = static_cast<int>(round_up(s.seqlen_k, kSequencePad));
  const int64_t q_heads = static_cast<int64_t>(s.batch) * s.nheads_q;
  const int64_t kv_heads = static_cast<int64_t>(s.batch) * s.nheads_k;
  const int64_t q_images = q_heads / group;
  p.q.assign(q_images * p.rows_q * row_bytes, 0);
  p.k.assign(kv_heads * p.rows_k * row_bytes, 0);
  const bool half = weights == Weights::kHalf;
  p.v.assign(kv_heads * p.rows_k * packed_dim * (half ? 2 : 1), 0);
  p.q_scale.assign(q_images * p.rows_q, 0.0f);
  p.lse_shift.assign(q_images * p.rows_q, 0.0f);
  p.key_constants.assign(kv_heads * p.rows_k * 2, 0.0f);
  p.v_scale.assign(kv_heads * packed_dim, 0.0f);
  for (int64_t head = 0; head < q_heads; ++head) {
    const int64_t b = head / s.nheads_q;
    const int64_t kv_head = head / (s.nheads_q / s.nheads_k);
    for (int i = 0; i < s.seqlen_q; ++i) {
      const size_t token = (b * s.seqlen_q + i) * s.nheads_q + head % s.nheads_q;
      const int64_t image = head / group;
      const int64_t row = i * group + head % group;
      p.q_scale[image * p.rows_q + row] = z.q_scale[token];
      double shift = 0;
      for (int d = 0; d < dim; ++d) {
        p.q[image * p.rows_q * row_bytes + packed_row_offset(p.rows_q, row_bytes, row, d)] =
            z.q[token * dim + d];
        shift +=
            static_cast<double>(value_of(inputs.q[token * dim + d])) * z.k_mean[kv_head * dim + d];
      }
      p.lse_shift[image * p.rows_q + row] = static_cast<float>(shift / std::sqrt(double(dim)));
    }
  }
  for (int64_t head = 0; head < kv_heads; ++head) {
    const int64_t b = head / s.nheads_k;
    for (int d = 0; d < dim; ++d) p.v_scale[head * packed_dim + d] = z.v_scale[head * dim + d];
    for (int j = 0; j < s.seqlen_k; ++j) {
      const size_t token = (b * s.seqlen_k + j) * s.nheads_k + head % s.nheads_k;
      float* constants = p.key_constants.data() + head * p.rows_k * 2;
      constants[key_constant_offset(j, 0)] = z.k_scale[token];
      constants[key_constant_offset(j, 1)] = z.ratio[token];
      for (int d = 0; d < dim; ++d) {
        p.k[head * p.rows_k * row_bytes + packed_row_offset(p.rows_k, row_bytes, j, d)] =
            z.k[token * dim + d];
        if (half) {
          int8_t* value =
              &p.v[head * p.rows_k * packed_dim * 2 + packed_v_half_offset(packed_dim, j, d)];
          value[0] = static_cast<int8_t>(z.v_half[token * dim + d] & 0xFF);
          value[1] = static_cast<int8_t>(z.v_half[token * dim + d] >> 8);
        } else {
          p.v[head * p.rows_k * packed_dim + packed_v_offset(packed_dim, j, d)] =
              z.v[token * dim + d];
        }
      }
    }
  }
  for (int i = 0; i < s.seqlen_q && s.attn_mask; ++i) {
    for (int h = 0; h < s.nheads_q; ++h) {
      for (int j = 0; j < s.seqlen_k; ++j) {
        p.attn_mask.push_back(Shape::added(h, i, j));
      }
    }
  }
  for (int h = 0; h < s.nheads_q; ++h) {
    p.slopes.push_back(Shape::slope(h));
    p.sinks.push_back(Shape::sink(h));
  }
  return p;
}

namespace {

template <class Kernel, class Call>
std::string launch(emulator::Async async, int x, int y, const Call& call) {
  emulator::Config config;
  config.threads = Kernel::kThreads;
  config.shared_bytes = std::max<size_t>(Kernel::kSharedBytes, 16);
  config.async = async;
  const emulator::Report report = emulator::run(config, {x, y, 1}, call);
  return report.ok ? "" : report.error;
}

template <int kRowBytes, int kPackedDim>
std::string pack_of_dim(const Inputs& inputs, Weights weights, bool smooth_k, int kv_block,
                        emulator::Async async, Packed& p, int group) {
  const Shape& s = inputs.shape;
  int first = s.seqlen_k;
  int last = 0;
  for (int b = 0; b < s.batch; ++b) {
    first = std::min(first, s.visible_keys(b).first);
    last = std::max(last, s.visible_keys(b).second);
  }
  first = std::min(first, last);
  const auto source = [&](const std::vector<uint16_t>& data, int seqlen, int nheads) {
    SourceTensor x{};
    x.data = data.data();
    x.stride_channel = 1;
    x.vectors = s.head_dim % 8 == 0;
    x.stride_head = s.head_dim;
    x.stride_row = static_cast<int64_t>(nheads) * s.head_dim;
    x.stride_batch = x.stride_row * seqlen;
    x.seqlen = seqlen;
    x.nheads = nheads;
    x.head_dim = s.head_dim;
    return x;
  };
  VisibleTokens visible{};
  visible.first = first;
  visible.last = last;
  if (!s.seqlens_k.empty() || !s.leftpad_k.empty()) {
    const bool own = !s.seqlens_k.empty();
    visible.seqlens_k = own ? s.seqlens_k.data() : nullptr;
    visible.leftpad_k = s.leftpad_k.empty() ? nullptr : s.leftpad_k.data();
    visible.seqlens_k_stride = visible.leftpad_k_stride = 1;
    visible.seqlen_q = s.seqlen_q;
    visible.seqlen_k = s.seqlen_k;
    visible.bottom_right = own && !s.top_left;
    const int counted = visible.bottom_right ? s.position_offset() - s.q_offset : 0;
    visible.first_offset = s.first_offset() - counted;
    visible.last_offset = s.last_offset() - counted;
  }
  const int kv_heads = s.batch * s.nheads_k;
  const int chunks = (last - first + 255) / 256;
  std::vector<float> mean(static_cast<size_t>(kv_heads) * kRowBytes);
  std::vector<double> sums(mean.size() * std::max(chunks, 1));
  std::string error;
  const auto keep = [&](const std::string& e) {
    if (error.empty()) error = e;
  };
  if (smooth_k && first < last) {
    const StatisticsParams params{source(inputs.k, s.seqlen_k, s.nheads_k),
                                  visible,
                                  sums.data(),
                                  chunks,
                                  mean.data(),
                                  kRowBytes,
                                  false};
    using Sum = ChannelStatistics<Source::kFloat16, Statistic::kSum>;
    keep(launch<Sum>(async, chunks, kv_heads, [&] { Sum::run(params); }));
    using Finish = FinishStatistics<Statistic::kSum>;
    keep(launch<Finish>(async, kv_heads, 1, [&] { Finish::run(params); }));
  }
  RowsParams rows{};
  rows.group = 1;
  rows.mean = smooth_k && first < last ? mean.data() : nullptr;
  rows.mean_channels = kRowBytes;
  rows.softmax_scale = static_cast<float>(1 / std::sqrt(double(s.head_dim)));
  RowsParams q_rows = rows;
  q_rows.x = source(inputs.q, s.seqlen_q, s.nheads_q);
  q_rows.codes = p.q.data();
  q_rows.rows = p.rows_q;
  q_rows.q_scale = p.q_scale.data();
  q_rows.heads_per_mean = s.nheads_q / s.nheads_k;
  q_rows.lse_shift = rows.mean != nullptr ? p.lse_shift.data() : nullptr;
  using Q = QuantizeRows<Source::kFloat16, kRowBytes, true>;
  q_rows.group = group;
  const int queries = (p.rows_q + group - 1) / group;
  keep(launch<Q>(async, (queries + Q::kBlockTokens - 1) / Q::kBlockTokens, s.batch * s.nheads_q,
                 [&] { Q::run(q_rows); }));
  RowsParams k_rows = rows;
  k_rows.x = source(inputs.k, s.seqlen_k, s.nheads_k);
  k_rows.codes = p.k.data();
  k_rows.rows = p.rows_k;
  k_rows.key_constants = p.key_constants.data();
  k_rows.heads_per_mean = 1;
  using K = QuantizeRows<Source::kFloat16, kRowBytes, false>;
  keep(launch<K>(async, p.rows_k / K::kBlockTokens, kv_heads, [&] { K::run(k_rows); }));

  std::vector<float> token_scale(static_cast<size_t>(kv_heads) * p.rows_k);
  std::vector<float> panel_scale(token_scale.size() / kPanelKeys);
  PackVParams v{};
  v.x = source(inputs.v, s.seqlen_k, s.nheads_k);
  v.codes = p.v.data();
  v.rows = p.rows_k;
  v.visible = visible;
  v.scale = p.v_scale.data();
  v.token_scale = token_scale.data();
  v.panel_scale = panel_scale.data();
  v.v_scale = p.v_scale.data();
  v.key_constants = p.key_constants.data();
  v.kv_block = kv_block;
  if (weights == Weights::kHalf) {
    using V = PackHalfV<Source::kFloat16>;
    const int blocks = (p.rows_k * (kPackedDim / 8) + V::kThreads - 1) / V::kThreads;
    keep(launch<V>(async, blocks, kv_heads, [&] { V::run(v, kPackedDim); }));
  } else if (weights == Weights::kFolded) {
    using V = PackV<Source::kFloat16, kPackedDim, true>;
    keep(launch<V>(async, p.rows_k / kPanelKeys, kv_heads, [&] { V::run(v); }));
    keep(launch<FoldV>(async, p.rows_k / kv_block, kv_heads, [&] { FoldV::run(v, kPackedDim); }));
  } else {
    std::vector<uint32_t> magnitudes(static_cast<size_t>(kv_heads) * kPackedDim *
                                     std::max(chunks, 1));
    const StatisticsParams params{v.x,
                                  visible,
                                  magnitudes.data(),
                                  chunks,
                                  p.v_scale.data(),
                                  kPackedDim,
                                  weights == Weights::kPaper};
    using Magnitude = ChannelStatistics<Source::kFloat16, Statistic::kMagnitude>;
    if (chunks > 0) {
      keep(launch<Magnitude>(async, chunks, kv_heads, [&] { Magnitude::run(params); }));
    }
    using Finish = FinishStatistics<Statistic::kMagnitude>;
    keep(launch<Finish>(async, kv_heads, 1, [&] { Finish::run(params); }));
    using V = PackV<Source::kFloat16, kPackedDim, false>;
    keep(launch<V>(async, p.rows_k / kPanelKeys, kv_heads, [&] { V::run(v); }));
  }
  return error;
}

}  // namespace

std::string pack_with_kernels(const Inputs& inputs, Weights weights, bool smooth_k, int kv_block,
                              emulator::Async async, Packed& packed, int group) {
  switch (packed_head_dim(inputs.shape.head_dim)) {
    case 64:
      return pack_of_dim<64, 64>(inputs, weights, smooth_k, kv_block, async, packed, group);
    case 96:
      return pack_of_dim<128, 96>(inputs, weights, smooth_k, kv_block, async, packed, group);
    case 128:
      return pack_of_dim<128, 128>(inputs, weights, smooth_k, kv_block, async, packed, group);
    default:
      return pack_of_dim<256, 256>(inputs, weights, smooth_k, kv_block, async, packed, group);
  }
}

AttendParams attend_params(const Shape& s, const Packed& packed, std::vector<float>& out,
                           std::vector<float>& lse) {
  AttendParams p{};
  p.q = packed.q.data();
  p.k = packed.k.data();
  p.v = packed.v.data();
  p.q_scale = packed.q_scale.data();
  p.key_constants = packed.key_constants.data();
  p.v_scale = packed.v_scale.data();
  p.lse_shift = s.softcap != 0 ? nullptr : packed.lse_shift.data();
  p.changes = {};
  if (s.softcap != 0) {
    p.changes.softcap = s.softcap * 1.4426950408889634f;
    p.changes.softcap_rate = 2 / s.softcap;
    p.changes.score_shift = packed.lse_shift.data();
  }
  p.changes.alibi_slopes = s.alibi ? packed.slopes.data() : nullptr;
  p.changes.alibi_stride_head = 1;
  p.changes.attn_mask_stride_key = 1;
  p.changes.attn_mask_stride_head = s.seqlen_k;
  p.changes.attn_mask_stride_row = static_cast<int64_t>(s.seqlen_k) * s.nheads_q;
  p.changes.attn_mask = s.attn_mask ? packed.attn_mask.data() : nullptr;
  p.changes.position_offset = s.position_offset();
  p.sinks_stride = 1;
  if (!s.seqlens_k.empty()) {
    p.seqlens_k = s.seqlens_k.data();
    p.seqlens_k_stride = 1;
    p.bottom_right = !s.top_left;
    p.changes.position_offset = s.q_offset;
  }
  if (!s.leftpad_k.empty()) {
    p.leftpad_k = s.leftpad_k.data();
    p.leftpad_k_stride = 1;
  }
  p.sinks = s.sinks ? packed.sinks.data() : nullptr;
  out.assign(static_cast<size_t>(s.batch) * s.seqlen_q * s.nheads_q * s.head_dim, NAN);
  lse.assign(out.size() / s.head_dim, NAN);
  p.out = out.data();
  p.lse = lse.data();
  p.out_stride_channel = 1;
  p.out_pairs = s.head_dim % 2 == 0;
  p.out_stride_head = s.head_dim;
  p.out_stride_row = static_cast<int64_t>(s.nheads_q) * s.head_dim;
  p.out_stride_batch = p.out_stride_row * s.seqlen_q;
  p.lse_stride_head = 1;
  p.lse_stride_row = s.nheads_q;
  p.lse_stride_batch = static_cast<int64_t>(s.nheads_q) * s.seqlen_q;
  p.nheads_q = s.nheads_q;
  p.nheads_k = s.nheads_k;
  p.rows_q = packed.rows_q;
  p.rows_k = packed.rows_k;
  p.seqlen_q = s.seqlen_q;
  p.seqlen_k = s.seqlen_k;
  p.head_dim = s.head_dim;
  const int counted = p.bottom_right ? s.position_offset() - s.q_offset : 0;
  p.first_offset = s.first_offset() - counted;
  p.last_offset = s.last_offset() - counted;
  p.group = 1;
  p.group_inverse = group_inverse_of(1);
  p.out_type = Element::kFloat32;
  p.score_scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(s.head_dim)));
  return p;
}

}  // namespace attn8::cuda::testing
