// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr Mode kKernelModes[] = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact};

KernelCase base_case(Mode mode) {
  KernelCase c;
  c.options.mode = mode;
  c.options.mask.causal = true;
  c.batch = 2;
  c.nheads_q = 4;
  c.nheads_k = 2;
  c.seqlen_q = 90;
  c.seqlen_k = 170;
  c.head_dim = 72;
  c.data = Data::kOutliers;
  return c;
}

bool all_isas_available() {
  for (const IsaSupport& support : isa_support()) {
    if (!support.available) return false;
  }
  return true;
}

/// The integer modes give the same bits on every ISA, output and LSE, whatever the head_dim.
TEST(Invariants, IsasAgreeBitForBit) {
  if (!all_isas_available()) GTEST_SKIP() << "this machine lacks one of the ISAs";
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper}) {
    for (const Granularity granularity :
         {Granularity::kToken, Granularity::kTensor, Granularity::kBlockChannel}) {
      for (const int64_t head_dim : {1, 7, 64, 72, 128, 200}) {
        KernelCase c = base_case(mode);
        c.head_dim = head_dim;
        c.options.v_granularity = granularity;
        const KernelInputs inputs = make_inputs(c);
        const KernelResult scalar = run_kernel(c, inputs.operands(), Isa::kScalar);
        for (const Isa isa : {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni}) {
          const KernelResult other = run_kernel(c, inputs.operands(), isa);
          ASSERT_EQ(scalar.out.bytes(), other.out.bytes()) << to_string(isa) << " " << c.name();
          ASSERT_EQ(scalar.lse.bytes(), other.lse.bytes()) << to_string(isa) << " " << c.name();
        }
      }
    }
  }
}

class Invariants : public EachIsa {};

TEST_P(Invariants, ThreadsDoNotChangeBits) {
  for (const Mode mode : kKernelModes) {
    KernelCase c = base_case(mode);
    const KernelInputs inputs = make_inputs(c);
    const KernelResult one = run_kernel(c, inputs.operands(), GetParam());
    for (const int32_t threads : {2, 3, 7}) {
      c.threads = threads;
      const KernelResult many = run_kernel(c, inputs.operands(), GetParam());
      EXPECT_EQ(one.out.bytes(), many.out.bytes()) << threads << " threads, " << c.name();
      EXPECT_EQ(one.lse.bytes(), many.lse.bytes()) << threads << " threads, " << c.name();
    }
  }
}

/// A caller's thread pool replaces OpenMP and gives the same bits.
TEST_P(Invariants, OwnThreadPool) {
  KernelCase c = base_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  const KernelResult expected = run_kernel(c, inputs.operands(), GetParam());
  std::atomic<int> calls = 0;
  Context context = Context::with_isa(GetParam(), 3);
  context.pool = &calls;
  context.parallel_for = [](void* pool, int64_t count, void (*body)(void*, int64_t),
                            void* argument) {
    ++*static_cast<std::atomic<int>*>(pool);
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, argument, i);
    for (std::thread& thread : threads) thread.join();
  };
  Tensor out(DType::kFloat32, inputs.q.shape());
  Tensor lse(DType::kFloat32, {c.batch, c.seqlen_q, c.nheads_q, 1});
  const Status status = attention(inputs.operands(), {out.view(), lse.view()}, c.options, context);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_GT(calls.load(), 0);
  EXPECT_EQ(expected.out.bytes(), out.bytes());
  EXPECT_EQ(expected.lse.bytes(), lse.bytes());
}

/// Few queries have kernels of their own; each row gets the bits it gets among many.
TEST_P(Invariants, FewQueriesGetTheBitsOfMany) {
  for (const int64_t head_dim : {16, 72, 128, 256}) {
    for (const int64_t seqlen_q : {1, 2, 3, 4}) {
      KernelCase many;
      many.seqlen_q = 40;
      many.seqlen_k = 700;
      many.nheads_q = 2;
      many.head_dim = head_dim;
      many.data = Data::kOutliers;
      const KernelInputs inputs = make_inputs(many);
      const KernelResult expected = run_kernel(many, inputs.operands(), GetParam());
      KernelCase few = many;
      few.seqlen_q = seqlen_q;
      KernelInputs first{Tensor(many.dtype, {1, seqlen_q, 2, head_dim}), inputs.k, inputs.v};
      first.q.fill(
          [&](int64_t b, int64_t s, int64_t h, int64_t d) { return inputs.q.get(b, s, h, d); });
      const KernelResult got = run_kernel(few, first.operands(), GetParam());
      for (int64_t s = 0; s < seqlen_q; ++s) {
        for (int64_t h = 0; h < 2; ++h) {
          ASSERT_EQ(expected.lse.get(0, s, h, 0), got.lse.get(0, s, h, 0)) << few.name();
          for (int64_t d = 0; d < head_dim; ++d) {
            ASSERT_EQ(expected.out.get(0, s, h, d), got.out.get(0, s, h, d)) << few.name();
          }
        }
      }
    }
  }
}

TEST_P(Invariants, PermutingHeadsPermutesOutputs) {
  for (const Mode mode : kKernelModes) {
    KernelCase c = base_case(mode);
    c.nheads_q = c.nheads_k = 3;
    const KernelInputs inputs = make_inputs(c);
    KernelInputs rotated = inputs;
    for (auto [from, to] : {std::pair<const Tensor*, Tensor*>{&inputs.q, &rotated.q},
                            {&inputs.k, &rotated.k},
                            {&inputs.v, &rotated.v}}) {
      to->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return from->get(b, s, (h + 1) % 3, d);
      });
    }
    const KernelResult a = run_kernel(c, inputs.operands(), GetParam());
    const KernelResult b = run_kernel(c, rotated.operands(), GetParam());
    Tensor expected = b.out;
    expected.fill([&](int64_t batch, int64_t s, int64_t h, int64_t d) {
      return a.out.get(batch, s, (h + 1) % 3, d);
    });
    EXPECT_EQ(expected.bytes(), b.out.bytes()) << c.name();
  }
}

/// Keys that no query sees change nothing, not even when they hold NaN.
TEST_P(Invariants, InvisibleKeysChangeNothing) {
  for (const Mode mode : kKernelModes) {
    KernelCase c = base_case(mode);
    c.options.mask.align = CausalAlign::kTopLeft;
    c.seqlen_q = c.seqlen_k = 100;
    const KernelInputs inputs = make_inputs(c);
    const KernelResult expected = run_kernel(c, inputs.operands(), GetParam());
    KernelCase longer = c;
    longer.seqlen_k = 700;
    KernelInputs more{inputs.q, Tensor(c.dtype, {c.batch, 700, c.nheads_k, c.head_dim}),
                      Tensor(c.dtype, {c.batch, 700, c.nheads_k, c.head_dim})};
    for (auto [from, to] :
         {std::pair<const Tensor*, Tensor*>{&inputs.k, &more.k}, {&inputs.v, &more.v}}) {
      to->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return s < 100 ? from->get(b, s, h, d) : std::numeric_limits<double>::quiet_NaN();
      });
    }
    const KernelResult got = run_kernel(longer, more.operands(), GetParam());
    EXPECT_EQ(expected.out.bytes(), got.out.bytes()) << c.name();
    EXPECT_EQ(expected.lse.bytes(), got.lse.bytes()) << c.name();
  }
}

/// The output does not depend on whether the LSE is asked for.
TEST_P(Invariants, LseDoesNotChangeTheOutput) {
  for (const Mode mode : kKernelModes) {
    const KernelCase c = base_case(mode);
    const KernelInputs inputs = make_inputs(c);
    const KernelResult with = run_kernel(c, inputs.operands(), GetParam());
    Tensor out(DType::kFloat32, inputs.q.shape());
    const Status status =
        attention(inputs.operands(), {out.view()}, c.options, Context::with_isa(GetParam()));
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(with.out.bytes(), out.bytes()) << c.name();
  }
}

/// Scaling V by a power of two scales the output exactly.
TEST_P(Invariants, PowersOfTwoInVCommute) {
  for (const Mode mode : kKernelModes) {
    const KernelCase c = base_case(mode);
    const KernelInputs inputs = make_inputs(c);
    KernelInputs scaled = inputs;
    scaled.v.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      return 0x1p-9 * inputs.v.get(b, s, h, d);
    });
    const std::vector<double> a = run_kernel(c, inputs.operands(), GetParam()).out.values();
    const std::vector<double> b = run_kernel(c, scaled.operands(), GetParam()).out.values();
    for (size_t i = 0; i < a.size(); ++i) {
      if (std::abs(a[i]) < 0x1p-100) continue;  // subnormal once scaled
      ASSERT_EQ(a[i] * 0x1p-9, b[i]) << c.name() << " at " << i;
    }
  }
}

/// Where a NaN or an Inf enters, every output that reads it is NaN and no other changes.
TEST_P(Invariants, NonFiniteTokensPoisonWhatReadsThem) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact}) {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      for (const char tensor : {'q', 'k', 'v'}) {
        // One V scale for all of paper's tokens: its NaN reaches every row.
        if (mode == Mode::kPaper && tensor == 'v') continue;
        KernelCase c = base_case(mode);
        c.data = Data::kNormal;
        c.nheads_q = c.nheads_k = 1;
        c.batch = 1;
        c.seqlen_q = c.seqlen_k = 80;
        c.options.smooth_k = false;
        KernelInputs inputs = make_inputs(c);
        const std::vector<double> clean = run_kernel(c, inputs.operands(), GetParam()).out.values();
        Tensor& target = tensor == 'q' ? inputs.q : tensor == 'k' ? inputs.k : inputs.v;
        target.set(0, 37, 0, 5, bad);
        const KernelResult got = run_kernel(c, inputs.operands(), GetParam());
        for (int64_t s = 0; s < 80; ++s) {
          const bool reads = tensor == 'q' ? s == 37 : s >= 37;  // causal
          bool any_nan = false;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            const double value = got.out.get(0, s, 0, d);
            any_nan = any_nan || !std::isfinite(value);
            if (!reads) {
              ASSERT_EQ(value, clean[static_cast<size_t>(s * c.head_dim + d)])
                  << tensor << " " << bad << " row " << s << " " << c.name();
            }
          }
          // A float attention turns an infinite score of one sign into weight 0: nothing to poison.
          if (mode != Mode::kExact && reads) {
            EXPECT_TRUE(any_nan) << tensor << " " << bad << " row " << s << " " << c.name();
          }
        }
      }
    }
  }
}

ATTN8_INSTANTIATE_EACH_ISA(Invariants);

}  // namespace
}  // namespace attn8::testing
