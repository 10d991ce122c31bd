// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// A CPU with AVX512-BF16 never runs the AVX-512 table without it, so that both are compared here on
// one tile of `half`.
#include <cmath>
#include <cstring>
#include <vector>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "cpu/isa_tables.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

#if defined(__x86_64__)

struct alignas(64) Line {
  std::byte bytes[64];
};

/// Zeroed memory at a 64-byte boundary.
class Memory {
 public:
  explicit Memory(size_t bytes) : lines_(bytes / 64 + 1, Line{}) {}
  [[nodiscard]] std::byte* data() noexcept { return lines_[0].bytes; }

 private:
  std::vector<Line> lines_;
};

constexpr int kHeadDim = 40;
constexpr int kBlock = 64;
constexpr int kKeys = 101;  // the last pair is half visible

/// out of the tile [rows][padded_dim], the same data for every table.
std::vector<float> run_half(const KernelTable& table) {
  const BlockLayout layout = block_layout(kBlock, kHeadDim, 1, 2, false);
  const auto padded = static_cast<size_t>(padded_dim(kHeadDim));
  Memory blocks(2 * layout.bytes);
  Memory header(layout.header_bytes);
  const PackedBlock packed[2] = {{blocks.data(), header.data()},
                                 {blocks.data() + layout.bytes, header.data()}};
  for (size_t b = 0; b < 2; ++b) {
    std::byte* block = blocks.data() + b * layout.bytes;
    auto& record = reinterpret_cast<KeyRecord*>(block + layout.records)[0];
    for (size_t i = 0; i < kKeyGroup; ++i) record.k_scale[i] = 0.01F;
    auto* k = reinterpret_cast<int8_t*>(block + layout.k);
    for (size_t i = 0; i < layout.k_group_bytes; ++i) {
      k[i] = static_cast<int8_t>(std::lround(40 * normal_at(1 + b, i)));
    }
    auto* v = reinterpret_cast<uint16_t*>(block + layout.v);
    for (size_t i = 0; i < kKeyGroup * padded; ++i) {
      v[i] = float_to_bfloat16(static_cast<float>(normal_at(3 + b, i)));
    }
  }
  Memory q(kQueryTile * padded), out(kQueryTile * padded * 4), sums(3 * kQueryTile * 4);
  for (size_t i = 0; i < kQueryTile * padded; ++i) {
    q.data()[i] = static_cast<std::byte>(128 + std::lround(30 * normal_at(5, i)));
  }
  Memory scratch(table.scratch_bytes(kBlock));
  AttendTile tile = {};
  tile.mode = Mode::kHalf;
  tile.head_dim = kHeadDim;
  tile.kv_block = kBlock;
  tile.rows = kQueryTile - 1;  // whole groups of rows and single ones
  tile.kv.blocks = packed;
  tile.kv.layout = layout;
  tile.kv.keys = {0, kKeys};
  for (int r = 0; r < kQueryTile; ++r) {
    tile.visible[r] = {r % 3, kKeys - r % 5};
    tile.score_factor[r] = 0.02F;
  }
  tile.q = q.data();
  tile.out = reinterpret_cast<float*>(out.data());
  tile.normalizer = reinterpret_cast<float*>(sums.data());
  tile.weight_sum = tile.normalizer + kQueryTile;
  tile.row_max = tile.weight_sum + kQueryTile;
  tile.scratch = scratch.data();
  table.attend(tile);
  std::vector<float> result(tile.out, tile.out + tile.rows * static_cast<int64_t>(padded));
  result.insert(result.end(), tile.normalizer, tile.normalizer + tile.rows);
  return result;
}

TEST(Bfloat16Pairs, BothTablesOfAvx512Agree) {
  const KernelTable* best = find_kernel_table(Isa::kAvx512Vnni);
  if (best == nullptr || !best->bfloat16_pairs) GTEST_SKIP() << "the CPU has no AVX512-BF16";
  const std::vector<float> with = run_half(*best);
  const std::vector<float> without = run_half(avx512_vnni::table());
  ASSERT_FALSE(avx512_vnni::table().bfloat16_pairs);
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < with.size(); ++i) {
    ASSERT_TRUE(std::isfinite(with[i])) << i;
    difference += std::pow(with[i] - without[i], 2);
    size += std::pow(without[i], 2);
  }
  EXPECT_GT(size, 0);
  // The same products; their sums are rounded differently.
  EXPECT_LT(std::sqrt(difference / size), 1e-6);
}

#endif

}  // namespace
}  // namespace attn8::testing
