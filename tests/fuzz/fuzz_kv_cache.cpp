// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Bytes to operations on a small KV cache, beside a model that holds plain floats. Attention has
// the bits of attention() over the model's own codes; no operation changes what another sequence
// gives; one that fails changes nothing; pages are counted by plain rules.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "fuzz_target.hpp"
#include "kv_cache/cache_model.hpp"

namespace attn8::fuzz {
namespace {

using testing::Memory;
using testing::ModelSequence;
using testing::Tensor;

constexpr int64_t kPageSize = 64;

struct Live {
  KvSequence handle;
  ModelSequence model;
  std::vector<std::shared_ptr<int>> pages;  ///< shared as the cache must share them
  std::vector<std::byte> bits;              ///< attention of a fixed query over it
};

int64_t pages_for(int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

class Life {
 public:
  explicit Life(ByteReader& bytes)
      : bytes_(bytes),
        heads_(bytes.pick({1, 1, 2})),
        dim_(bytes.pick({8, 1, 3, 16, 20, 33})),
        dim_v_(bytes.pick({dim_, dim_, int64_t{1}, int64_t{24}, int64_t{40}})),
        max_pages_(1 + bytes.below(9)),
        smooth_k_(!bytes.one_in(3)),
        isa_(bytes.pick({Isa::kAvx512Vnni, Isa::kAvx2, Isa::kScalar})),
        cache_(make()) {
    const auto& support = isa_support();
    const auto available = [&](Isa isa) {
      return std::ranges::any_of(support,
                                 [&](const auto& s) { return s.isa == isa && s.available; });
    };
    if (!available(isa_)) isa_ = Isa::kScalar;
    fixed_q_ = Tensor(DType::kFloat32, {1, 2, heads_, dim_});
    fixed_q_.fill_normal(7);
  }

  /// Operations done.
  int run() {
    int steps = 0;
    while (!bytes_.at_end() && steps < 32) {
      step();
      ++steps;
      check_usage();
      if (!live_.empty()) check_bits(live_[bytes_.below(static_cast<uint32_t>(live_.size()))]);
    }
    for (Live& live : live_) check_bits(live);
    while (!live_.empty()) free_one();
    check_usage();
    expect(cache_.usage().pages_used == 0, "pages are left at the end");
    return steps;
  }

 private:
  KvCache make() const {
    Result<KvCache> cache = KvCache::make({.nheads_k = heads_,
                                           .head_dim = dim_,
                                           .head_dim_v = dim_v_,
                                           .page_size = kPageSize,
                                           .max_pages = max_pages_,
                                           .smooth_k = smooth_k_});
    expect(cache.ok(), "make: " + cache.status().message());
    return cache.value();
  }

  [[nodiscard]] Context context() { return Context::with_isa(isa_, 1 + bytes_.below(2)); }
  size_t pick() { return bytes_.below(static_cast<uint32_t>(live_.size())); }

  void step() {
    const uint32_t choice = live_.empty() ? 0 : bytes_.below(16);
    if (choice < 2) {
      if (live_.size() < 6) create();
    } else if (choice < 8) {
      append(live_[pick()]);
    } else if (choice < 10) {
      if (live_.size() < 6) fork(live_[pick()]);
    } else if (choice < 12) {
      truncate(live_[pick()]);
    } else if (choice < 13) {
      free_one();
    } else {
      attend_batch();
    }
  }

  void create() {
    const Result<KvSequence> sequence = cache_.create();
    expect(sequence.ok(), "create: " + sequence.status().message());
    live_.push_back({sequence.value(), ModelSequence(heads_, dim_, smooth_k_, dim_v_), {}, {}});
    live_.back().bits = attended(live_.back());
    append(live_.back());
  }

  /// Values of 1 to 5 times a power of two up to 2^12, so that no token of V lies 2^16 below
  /// another (docs/kv-cache.md), now and then a zero token, a NaN or an Inf.
  Tensor tokens(int64_t count, int64_t dim) {
    const uint64_t seed = bytes_.byte();
    const int spread = bytes_.pick({0, 0, 4, 12});
    Tensor x(bytes_.pick({DType::kFloat32, DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
             {1, count, heads_, dim},
             bytes_.pick({Memory::kBshd, Memory::kBshd, Memory::kBhsd, Memory::kStrided,
                          Memory::kReversed}));
    x.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
      const auto index = static_cast<uint64_t>((s * 7 + h) * 257 + d);
      if (spread > 0 && (s + h) % 11 == 5) return 0.0;
      const double value = value_at(seed, index);
      return std::ldexp(value + std::copysign(1.0, value),
                        static_cast<int>(s + h) * 5 % (spread + 1));
    });
    if (count > 0 && bytes_.one_in(8)) {
      const double special = bytes_.pick({std::nan(""), std::numeric_limits<double>::infinity(),
                                          -std::numeric_limits<double>::infinity(), -0.0, 300.0});
      x.set(0, bytes_.below(static_cast<uint32_t>(count)), 0,
            bytes_.below(static_cast<uint32_t>(dim)), special);
    }
    return x;
  }

  static bool shared(const std::shared_ptr<int>& page) { return page.use_count() > 1; }

  std::shared_ptr<int> take() {
    auto page = std::make_shared<int>();
    known_.push_back(page);
    return page;
  }

  int64_t used() {
    std::erase_if(known_, [](const auto& page) { return page.expired(); });
    return std::ssize(known_);
  }

  /// Whether the status is what a call that wants so many pages must answer.
  bool succeeded(const char* call, const Status& status, int64_t wanted) {
    const int64_t left = max_pages_ - used();
    if (wanted <= left) {
      expect(status.ok(), std::string(call) + ": " + status.message());
      return true;
    }
    expect(status.code() == StatusCode::kOutOfMemory,
           std::string(call) + " wants " + std::to_string(wanted) + " pages of " +
               std::to_string(left) + " and answers '" + status.message() + "'");
    return false;
  }

  void append(Live& live) {
    const int64_t count =
        bytes_.pick({1, 1, 1, 2, 63, 64, 65, 0, static_cast<int>(bytes_.below(150))});
    const Tensor k = tokens(count, dim_);
    const Tensor v = tokens(count, dim_v_);
    const int64_t before = live.model.length();
    const bool copies = count > 0 && before % kPageSize != 0 && shared(live.pages.back());
    const int64_t wanted = pages_for(before + count) - pages_for(before) + (copies ? 1 : 0);
    const Status status = cache_.append(live.handle, k.view(), v.view(), context());
    if (!succeeded("append", status, wanted)) return check_bits(live);
    live.model.append(k, v);
    if (copies) live.pages.back() = take();
    while (std::ssize(live.pages) < pages_for(before + count)) live.pages.push_back(take());
    live.bits = attended(live);
  }

  void fork(const Live& parent) {
    const int64_t length = parent.model.length();
    const int64_t kept =
        bytes_.one_in(2) ? length : bytes_.below(static_cast<uint32_t>(length) + 1);
    const bool own_tail = kept % kPageSize != 0 && kept < length;
    const Result<KvSequence> child = cache_.fork(parent.handle, kept);
    if (!succeeded("fork", child.status(), own_tail ? 1 : 0)) return check_bits(parent);
    Live live = {child.value(), parent.model, parent.pages, {}};
    live.model.truncate(kept);
    live.pages.resize(static_cast<size_t>(pages_for(kept)));
    if (own_tail) live.pages.back() = take();
    live.bits = attended(live);
    live_.push_back(std::move(live));
  }

  void truncate(Live& live) {
    const int64_t length = live.model.length();
    const int64_t kept = bytes_.below(static_cast<uint32_t>(length) + 1);
    const bool copies = kept % kPageSize != 0 && kept < length &&
                        shared(live.pages[static_cast<size_t>(kept / kPageSize)]);
    if (!succeeded("truncate", cache_.truncate(live.handle, kept), copies ? 1 : 0)) {
      return check_bits(live);
    }
    live.model.truncate(kept);
    live.pages.resize(static_cast<size_t>(pages_for(kept)));
    if (copies) live.pages.back() = take();
    live.bits = attended(live);
  }

  void free_one() {
    const size_t i = pick();
    const KvSequence handle = live_[i].handle;
    succeeded("free", cache_.free(handle), 0);
    live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(i));
    expect(cache_.length(handle).status().code() == StatusCode::kInvalidArgument,
           "a freed sequence has a length");
    expect(cache_.free(handle).code() == StatusCode::kInvalidArgument, "freed twice");
  }

  std::vector<std::byte> attended(const Live& live) const {
    Tensor out(DType::kFloat32, {1, 2, heads_, dim_v_});
    const std::vector<int32_t> cu_seqlens_q = {0, 2};
    const Status status = cache_.attend({&live.handle, 1}, fixed_q_.view(), cu_seqlens_q,
                                        {out.view()}, {}, Context::with_isa(isa_));
    expect(status.ok(), "attend: " + status.message());
    return out.bytes();
  }

  void check_bits(const Live& live) const {
    const Result<int64_t> length = cache_.length(live.handle);
    expect(length.ok() && length.value() == live.model.length(), "a length is not the model's");
    expect(attended(live) == live.bits, "a sequence nobody wrote to gives other bits");
  }

  void check_usage() {
    const KvCacheUsage usage = cache_.usage();
    expect(usage.pages_used == used() && usage.pages_used + usage.pages_free == max_pages_ &&
               usage.sequences == std::ssize(live_) &&
               usage.bytes_used == static_cast<size_t>(usage.pages_used) * usage.bytes_per_page,
           "usage is " + std::to_string(usage.pages_used) + " pages, the model's " +
               std::to_string(used()));
  }

  /// Any mix of sequences against attention() over the codes of the model, one by one.
  void attend_batch() {
    std::vector<KvSequence> handles;
    std::vector<const Live*> batch;
    std::vector<int32_t> cu_seqlens_q = {0};
    for (uint32_t n = 1 + bytes_.below(3); n > 0; --n) {
      batch.push_back(&live_[pick()]);
      handles.push_back(batch.back()->handle);
      cu_seqlens_q.push_back(cu_seqlens_q.back() +
                             static_cast<int32_t>(bytes_.below(bytes_.pick({2U, 5U, 70U}))));
    }
    const int64_t total = cu_seqlens_q.back();
    const int64_t nheads_q = heads_ * bytes_.pick({1, 2, 3});
    Tensor q(DType::kFloat32, {1, total, nheads_q, dim_});
    q.fill_normal(bytes_.byte(), bytes_.pick({1.0, 0.0, 20.0}));
    Tensor out(DType::kFloat32, {1, total, nheads_q, dim_v_});
    Tensor lse(DType::kFloat32, {1, total, nheads_q, 1});
    KvCacheAttentionOptions options = {
        .mode = bytes_.pick({Mode::kAccurate, Mode::kAccurate, Mode::kHalf, Mode::kExact}),
        .mask = {.causal = bytes_.one_in(2)}};
    if (bytes_.one_in(4)) options.softmax_scale = bytes_.pick({0.0F, -1.0F, 0.3F});
    if (bytes_.one_in(6)) options.softcap = bytes_.pick({5.0F, 0.25F, 50.0F});
    std::vector<Mode> head_modes;
    if (bytes_.one_in(8)) {
      for (int64_t h = 0; h < heads_; ++h) {
        head_modes.push_back(bytes_.pick({Mode::kAccurate, Mode::kHalf, Mode::kExact}));
      }
      options.head_modes = head_modes;
    }
    Tensor slopes(DType::kFloat32, {1, 1, nheads_q, 1});
    slopes.fill_normal(bytes_.byte(), 0.1);
    if (bytes_.one_in(6)) options.alibi_slopes = slopes.view();
    Tensor sinks(DType::kFloat32, {1, 1, nheads_q, 1});
    sinks.fill_normal(bytes_.byte());
    if (bytes_.one_in(6)) options.sinks = sinks.view();
    Tensor attn_mask;
    if (bytes_.one_in(3)) {
      int64_t longest = 0;
      for (const Live* live : batch) longest = std::max(longest, live->model.length());
      attn_mask = mask_for(total, nheads_q, longest);
      options.attn_mask = attn_mask.view();
    }
    const Status status = cache_.attend(handles, q.view(), cu_seqlens_q, {out.view(), lse.view()},
                                        options, context());
    expect(status.ok(), "attend: " + status.message());
    for (size_t i = 0; i < batch.size(); ++i) {
      const int64_t rows = cu_seqlens_q[i + 1] - cu_seqlens_q[i];
      if (rows == 0) continue;
      const auto part = [&](TensorView x) {
        x.data = static_cast<float*>(x.data) + cu_seqlens_q[i] * x.strides[1];
        x.shape[1] = rows;
        return x;
      };
      const testing::Attended want = testing::attend_model(
          batch[i]->model, q, cu_seqlens_q[i], rows, kPageSize, options, Context::with_isa(isa_));
      expect_same(part(out.view()), want.out);
      expect_same(part(lse.view()), want.lse);
    }
  }

  /// Of any broadcast and type, keys to spare, some of them hidden.
  Tensor mask_for(int64_t total, int64_t nheads_q, int64_t longest) {
    const auto either = [&](int64_t extent) { return bytes_.one_in(2) ? extent : int64_t{1}; };
    const DType dtype =
        bytes_.pick({DType::kBool, DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    const Extents shape = {1, either(total), either(nheads_q),
                           either(longest + bytes_.pick({0, 1, 70}))};
    Tensor mask(dtype, shape, bytes_.pick({Memory::kBshd, Memory::kBhsd, Memory::kReversed}));
    const uint64_t seed = bytes_.byte();
    const int64_t rare = bytes_.pick({2, 5, 64});
    mask.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
      const int64_t index = (s * 17 + h) * 719 + d;
      const bool hidden = index % rare == 1;
      if (dtype == DType::kBool) return hidden ? 0.0 : 1.0;
      return hidden ? -std::numeric_limits<double>::infinity()
                    : value_at(seed, static_cast<uint64_t>(index));
    });
    return mask;
  }

  /// Equal, or both NaN.
  static void expect_same(const TensorView& got, const Tensor& want) {
    const std::vector<double> values = want.values();
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = static_cast<const float*>(got.data)[i];
      expect(x == values[i] || (std::isnan(x) && std::isnan(values[i])),
             "attend over pages gives " + std::to_string(x) + " at element " + std::to_string(i) +
                 ", over the model's codes " + std::to_string(values[i]));
    }
  }

  ByteReader& bytes_;
  const int64_t heads_, dim_, dim_v_, max_pages_;
  const bool smooth_k_;
  Isa isa_;
  KvCache cache_;
  Tensor fixed_q_;
  std::vector<std::weak_ptr<int>> known_;
  std::vector<Live> live_;
};

}  // namespace

std::vector<Bytes> seeds() { return {}; }

}  // namespace attn8::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  attn8::fuzz::ByteReader bytes(data, size);
  return attn8::fuzz::Life(bytes).run() >= 4 ? 0 : -1;
}
