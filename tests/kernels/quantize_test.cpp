// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "support/kernel_case.hpp"

// quantize() and dequantize() against docs/numerics.md, "Scales and codes", written a second time
// here in float64: a float32 quotient or difference of floats is the float64 one rounded.

namespace attn8::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kSmallestNormal = std::numeric_limits<float>::min();

constexpr Granularity kGranularities[] = {Granularity::kToken, Granularity::kTensor,
                                          Granularity::kChannel, Granularity::kBlock,
                                          Granularity::kBlockChannel};

struct Quantized {
  Tensor codes, scale, mean;

  [[nodiscard]] QuantizedView view(const QuantSpec& spec, bool with_mean) const {
    QuantizedView view{codes.view(), scale.view(), spec};
    if (with_mean) view.mean = mean.view();
    return view;
  }
};

/// Result tensors for x, with nothing in them yet.
Quantized results_for(const Tensor& x, const QuantSpec& spec, Memory memory) {
  const Extents& s = x.shape();
  return {Tensor(DType::kInt8, s, memory), Tensor(DType::kFloat32, scale_shape(s, spec), memory),
          Tensor(DType::kFloat32, {s[0], 1, s[2], s[3]}, memory)};
}

double expected_mean(const Tensor& x, int64_t b, int64_t h, int64_t d) {
  const int64_t seqlen = x.shape()[1];
  double total = 0;
  for (int64_t begin = 0; begin < seqlen; begin += 4096) {
    double sum = 0;
    for (int64_t s = begin; s < std::min(seqlen, begin + 4096); ++s) sum += x.get(b, s, h, d);
    total += sum;
  }
  const auto mean = static_cast<float>(total / static_cast<double>(seqlen));
  return std::isfinite(mean) ? static_cast<double>(mean) : 0.0;
}

/// Scale of a group and, in `zero`, whether its codes are all 0.
float expected_scale(double largest, bool finite, bool* zero) {
  *zero = true;
  if (!finite) return kNan;
  const auto scale = static_cast<float>(largest / 127);
  if (scale < kSmallestNormal) return 1;
  *zero = false;
  int exponent = 0;
  const float fraction = std::frexp(scale, &exponent);  // 24 bits, of which the upper 21 stay
  return std::ldexp(std::floor(std::ldexp(fraction, 21)), exponent - 21);
}

/// What quantize() must leave in `to`; to.mean holds the given mean where there is one.
void expect_into(const Tensor& x, const QuantSpec& spec, Mean mean_use, Quantized& to) {
  const Extents& shape = x.shape();
  const Granularity g = spec.granularity;
  const bool blocks = g == Granularity::kBlock || g == Granularity::kBlockChannel;
  const bool channels = g == Granularity::kChannel || g == Granularity::kBlockChannel;
  if (mean_use == Mean::kCompute) {
    to.mean.fill(
        [&](int64_t b, int64_t, int64_t h, int64_t d) { return expected_mean(x, b, h, d); });
  }
  const auto value = [&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const double raw = x.get(b, s, h, d);
    if (mean_use == Mean::kNone) return raw;
    return static_cast<double>(static_cast<float>(raw - to.mean.get(b, 0, h, d)));
  };
  const int64_t step = g == Granularity::kToken ? 1 : blocks ? spec.block : shape[1];
  to.codes.fill([](int64_t, int64_t, int64_t, int64_t) { return 0; });
  to.scale.fill([&](int64_t b, int64_t group, int64_t h, int64_t channel) {
    double largest = 0;
    bool finite = true;
    const auto each = [&](auto visit) {
      for (int64_t s = group * step; s < std::min(shape[1], (group + 1) * step); ++s) {
        for (int64_t d = 0; d < shape[3]; ++d) {
          if (!channels || d == channel) visit(s, d);
        }
      }
    };
    each([&](int64_t s, int64_t d) {
      const double v = value(b, s, h, d);
      finite = finite && std::isfinite(v);
      largest = std::max(largest, std::fabs(v));
    });
    bool zero = false;
    const float scale = expected_scale(largest, finite, &zero);
    if (!zero) {
      each([&](int64_t s, int64_t d) {
        const auto quotient = static_cast<float>(value(b, s, h, d) / static_cast<double>(scale));
        to.codes.set(b, s, h, d, static_cast<double>(std::nearbyint(quotient)));
      });
    }
    return static_cast<double>(scale);
  });
}

std::string describe(const Tensor& x, const QuantSpec& spec, Mean mean_use, Memory memory) {
  std::ostringstream text;
  const Extents& s = x.shape();
  text << to_string(x.dtype()) << " [" << s[0] << ", " << s[1] << ", " << s[2] << ", " << s[3]
       << "] " << to_string(spec.granularity) << " block " << spec.block << " mean "
       << static_cast<int>(mean_use) << " memory " << static_cast<int>(memory);
  return text.str();
}

/// Runs quantize() and compares all bytes, those between the elements included.
void check(const Tensor& x, const QuantSpec& spec, Isa isa, Mean mean_use = Mean::kNone,
           Memory memory = Memory::kBshd, const Tensor* given = nullptr, int32_t threads = 1) {
  const std::string what = describe(x, spec, mean_use, memory);
  Quantized wanted = results_for(x, spec, memory);
  Quantized got = results_for(x, spec, memory);
  if (given != nullptr) wanted.mean = got.mean = *given;
  expect_into(x, spec, mean_use, wanted);
  std::optional<TensorView> mean;
  if (mean_use != Mean::kNone) mean = got.mean.view();
  const Status status = quantize(x.view(), spec, got.codes.view(), got.scale.view(),
                                 Context::with_isa(isa, threads), mean_use, mean);
  ASSERT_TRUE(status.ok()) << what << ": " << status.message();
  ASSERT_EQ(got.mean.bytes(), wanted.mean.bytes()) << what;
  ASSERT_EQ(got.scale.bytes(), wanted.scale.bytes()) << what;
  ASSERT_EQ(got.codes.bytes(), wanted.codes.bytes()) << what;
  for (const double code : got.codes.values()) ASSERT_GE(code, -127) << what;
}

/// Numbers whose tokens are of very different kinds; with `poison` some hold a NaN or an Inf.
Tensor difficult(DType dtype, const Extents& shape, Memory memory, bool poison, uint64_t seed) {
  const double huge = dtype == DType::kFloat16 ? 65504 : 3e38;
  const double tiny = dtype == DType::kFloat16 ? 0x1p-24 : 1e-39;
  Tensor x(dtype, shape, memory);
  x.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const auto place = static_cast<uint64_t>(((b * 9973 + s) * 31 + h) * 1009 + d);
    const double normal = normal_at(seed, place);
    switch ((s + static_cast<int64_t>(seed)) % 9) {
      case 0:
        return 0.0;
      case 1:
        return normal * tiny;
      case 2:
        return d % 3 == 1 ? -huge : normal;
      case 3:
        return d == 0 ? 127.0 : static_cast<double>(d % 126) - 62.5;  // ties: the scale is 1
      case 4:
        return poison && d == shape[3] / 2 ? static_cast<double>(kNan) : normal;
      case 5:
        return poison && d == shape[3] - 1 ? static_cast<double>(-kInf) : normal;
      default:
        return normal;
    }
  });
  return x;
}

class Quantize : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(Quantize);

/// Every granularity and type, lengths around the widths of vectors and the pieces of a row,
/// blocks that do not divide.
TEST_P(Quantize, MatchesTheDefinition) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Granularity granularity : kGranularities) {
      for (const int64_t dim : {1, 15, 16, 17, 257, 300}) {
        for (const bool poison : {false, true}) {
          const Tensor x =
              difficult(dtype, {1, 11, 2, dim}, Memory::kBshd, poison, static_cast<uint64_t>(dim));
          check(x, {granularity, 4}, GetParam());
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Quantize, AnyStrides) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Granularity granularity : kGranularities) {
      for (const Memory memory : {Memory::kBhsd, Memory::kStrided, Memory::kReversed}) {
        for (const Mean mean_use : {Mean::kNone, Mean::kCompute}) {
          const Tensor x = difficult(dtype, {2, 10, 3, 35}, memory, true, 5);
          check(x, {granularity, 3}, GetParam(), mean_use, memory);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Quantize, BlocksOfEverySize) {
  for (const Granularity granularity : {Granularity::kBlock, Granularity::kBlockChannel}) {
    for (const int32_t block : {1, 2, 12, 13, 14, 2147483647}) {
      const Tensor x = difficult(DType::kFloat32, {1, 13, 2, 20}, Memory::kBshd, true, 3);
      check(x, {granularity, block}, GetParam());
      if (HasFatalFailure()) return;
    }
  }
}

/// Around 4096 tokens the mean is a sum of sums.
TEST_P(Quantize, MeanOfLongSequences) {
  for (const int64_t seqlen : {1, 4096, 4097, 8193}) {
    Tensor x(DType::kFloat32, {1, seqlen, 1, 17});
    x.fill_normal(7, 1e3);
    // A channel whose sum shows where the partial sums begin: ones next to 2^60 are lost.
    for (int64_t t = 0; t < seqlen; ++t) {
      x.set(0, t, 0, 3, t == 0 ? 0x1p60 : t == 4096 ? -0x1p60 : 1.0);
    }
    check(x, {Granularity::kToken, 0}, GetParam(), Mean::kCompute);
    if (HasFatalFailure()) return;
  }
}

/// The mean of what holds a NaN or an Inf is 0; one near the largest float does not overflow.
TEST_P(Quantize, MeanOfExtremes) {
  for (const double value : {3e38, -3e38, static_cast<double>(kInf), static_cast<double>(kNan)}) {
    Tensor x(DType::kFloat32, {1, 9, 1, 18});
    x.fill_normal(9);
    for (int64_t s = 0; s < 9; ++s) x.set(0, s, 0, 17, value);
    x.set(0, 3, 0, 2, value);
    for (const Granularity granularity : {Granularity::kToken, Granularity::kChannel}) {
      check(x, {granularity, 0}, GetParam(), Mean::kCompute);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Quantize, GivenMean) {
  for (const Granularity granularity : kGranularities) {
    Tensor x(DType::kBFloat16, {2, 9, 2, 19}, Memory::kStrided);
    x.fill_normal(11);
    Tensor mean(DType::kFloat32, {2, 1, 2, 19}, Memory::kStrided);
    mean.fill_normal(12, 3);
    check(x, {granularity, 4}, GetParam(), Mean::kGiven, Memory::kStrided, &mean);
    // A difference that overflows, and a mean that is not a number, poison what they reach.
    x.set(0, 2, 0, 3, 3e38);
    mean.set(0, 0, 0, 3, -3e38);
    mean.set(1, 0, 1, 18, static_cast<double>(kNan));
    check(x, {granularity, 4}, GetParam(), Mean::kGiven, Memory::kStrided, &mean);
    if (HasFatalFailure()) return;
  }
}

/// One (batch, head) mean for all by a stride of 0.
TEST_P(Quantize, BroadcastInputAndMean) {
  Tensor x(DType::kFloat32, {1, 5, 1, 20});
  x.fill_normal(13);
  Tensor mean(DType::kFloat32, {1, 1, 1, 20});
  mean.fill_normal(14);
  Tensor repeated(DType::kFloat32, {3, 5, 2, 20});
  repeated.fill([&](int64_t, int64_t s, int64_t, int64_t d) { return x.get(0, s, 0, d); });
  Tensor repeated_mean(DType::kFloat32, {3, 1, 2, 20});
  repeated_mean.fill([&](int64_t, int64_t, int64_t, int64_t d) { return mean.get(0, 0, 0, d); });
  const QuantSpec spec;
  Quantized wanted = results_for(repeated, spec, Memory::kBshd);
  wanted.mean = repeated_mean;
  expect_into(repeated, spec, Mean::kGiven, wanted);
  Quantized got = results_for(repeated, spec, Memory::kBshd);
  ConstTensorView x_view = x.view();
  x_view.shape = repeated.shape();
  x_view.strides[0] = x_view.strides[2] = 0;
  TensorView mean_view = mean.view();
  mean_view.shape = repeated_mean.shape();
  mean_view.strides = {0, 0, 0, 1};
  const Status status = quantize(x_view, spec, got.codes.view(), got.scale.view(),
                                 Context::with_isa(GetParam()), Mean::kGiven, mean_view);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(got.codes.bytes(), wanted.codes.bytes());
  EXPECT_EQ(got.scale.bytes(), wanted.scale.bytes());
}

/// Values worked out by hand.
TEST_P(Quantize, TiesGoToTheEvenCode) {
  Tensor x(DType::kFloat32, {1, 1, 1, 20});
  const double values[] = {127, 0.5,   1.5,   2.5,   -0.5,  -1.5, -2.5, 126.5, -126.5, 125.5,
                           0,   -0.49, 63.51, -127., 0.501, 3.5,  4.5,  -3.5,  -4.5,   1};
  const double codes[] = {127, 0, 2,  2,    0, -2, -2, 126, -126, 126,
                          0,   0, 64, -127, 1, 4,  4,  -4,  -4,   1};
  for (int64_t d = 0; d < 20; ++d) x.set(0, 0, 0, d, values[d]);
  Quantized got = results_for(x, {}, Memory::kBshd);
  const Status status =
      quantize(x.view(), {}, got.codes.view(), got.scale.view(), Context::with_isa(GetParam()));
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(got.scale.get(0, 0, 0, 0), 1);
  EXPECT_EQ(got.codes.values(), std::vector<double>(std::begin(codes), std::end(codes)));
}

/// The scale steps from 1 with codes 0 to the smallest normal float where it becomes one.
TEST_P(Quantize, SmallestScale) {
  const float boundary = 127 * kSmallestNormal;
  for (const auto& [value, scale, code] :
       {std::tuple<float, float, int>{boundary, kSmallestNormal, 127},
        {-boundary, kSmallestNormal, -127},
        {std::nextafter(boundary, 0.0f) * 0.999f, 1, 0},
        {std::numeric_limits<float>::denorm_min(), 1, 0},
        {-0.0f, 1, 0}}) {
    Tensor x(DType::kFloat32, {1, 1, 1, 17});
    x.fill([&](int64_t, int64_t, int64_t, int64_t) { return static_cast<double>(value); });
    for (const Granularity granularity : {Granularity::kToken, Granularity::kChannel}) {
      Quantized got = results_for(x, {granularity, 0}, Memory::kBshd);
      const Status status = quantize(x.view(), {granularity, 0}, got.codes.view(), got.scale.view(),
                                     Context::with_isa(GetParam()));
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(got.scale.get(0, 0, 0, 0), static_cast<double>(scale)) << value;
      for (const double c : got.codes.values()) EXPECT_EQ(c, code) << value;
    }
  }
}

TEST_P(Quantize, ThreadsDoNotChangeBits) {
  for (const Granularity granularity : kGranularities) {
    const Tensor x = difficult(DType::kFloat32, {3, 20, 5, 33}, Memory::kBshd, true, 17);
    for (const int32_t threads : {2, 4, 64}) {
      check(x, {granularity, 6}, GetParam(), Mean::kCompute, Memory::kBshd, nullptr, threads);
      if (HasFatalFailure()) return;
    }
  }
}

/// Groups without elements have the scale of zeros; without groups there is nothing to write.
TEST_P(Quantize, EmptyTensors) {
  for (const Extents& shape : {Extents{0, 4, 2, 8}, Extents{2, 0, 2, 8}, Extents{2, 4, 0, 8},
                               Extents{2, 4, 2, 0}, Extents{0, 0, 0, 0}}) {
    for (const Granularity granularity : kGranularities) {
      for (const Mean mean_use : {Mean::kNone, Mean::kCompute}) {
        check(Tensor(DType::kFloat32, shape), {granularity, 3}, GetParam(), mean_use);
        if (HasFatalFailure()) return;
      }
    }
  }
}

class Dequantize : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(Dequantize);

/// float32(codes * scale) + mean, each operation rounded, then rounded to the type; and no further
/// from x than half a code and those roundings.
TEST_P(Dequantize, MatchesTheDefinitionAndTheBound) {
  for (const DType out_dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Granularity granularity : kGranularities) {
      for (const bool with_mean : {false, true}) {
        for (const Memory memory : {Memory::kBshd, Memory::kStrided, Memory::kReversed}) {
          const QuantSpec spec = {granularity, 4};
          Tensor x(DType::kFloat32, {1, 7, 2, 259}, memory);
          x.fill_normal(21, 5);
          Quantized q = results_for(x, spec, memory);
          std::optional<TensorView> mean;
          if (with_mean) mean = q.mean.view();
          const Context context = Context::with_isa(GetParam(), 2);
          Status status = quantize(x.view(), spec, q.codes.view(), q.scale.view(), context,
                                   with_mean ? Mean::kCompute : Mean::kNone, mean);
          ASSERT_TRUE(status.ok()) << status.message();
          Tensor out(out_dtype, x.shape(), memory);
          status = dequantize(q.view(spec, with_mean), out.view(), context);
          ASSERT_TRUE(status.ok()) << status.message();
          const bool blocks =
              granularity == Granularity::kBlock || granularity == Granularity::kBlockChannel;
          const bool channels =
              granularity == Granularity::kChannel || granularity == Granularity::kBlockChannel;
          const double unit = out_dtype == DType::kFloat32   ? 0x1p-24
                              : out_dtype == DType::kFloat16 ? 0x1p-11
                                                             : 0x1p-8;
          Tensor wanted(out_dtype, x.shape(), memory);
          wanted.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
            const int64_t group = granularity == Granularity::kToken ? s : blocks ? s / 4 : 0;
            const double scale = q.scale.get(b, group, h, channels ? d : 0);
            auto value = static_cast<float>(q.codes.get(b, s, h, d) * scale);
            if (with_mean) value += static_cast<float>(q.mean.get(b, 0, h, d));
            // The difference from the mean was rounded too.
            const double bound = scale * (0.5 + 127 * 0x1p-22) + std::fabs(value) * unit + 0x1p-20;
            EXPECT_LE(std::fabs(out.get(b, s, h, d) - x.get(b, s, h, d)), bound);
            return static_cast<double>(value);
          });
          ASSERT_EQ(out.bytes(), wanted.bytes())
              << describe(out, spec, with_mean ? Mean::kCompute : Mean::kNone, memory);
        }
      }
    }
  }
}

TEST_P(Dequantize, PoisonedGroupsAreNan) {
  Tensor x(DType::kFloat32, {1, 3, 1, 20});
  x.fill_normal(22);
  x.set(0, 1, 0, 7, static_cast<double>(kInf));
  Quantized q = results_for(x, {}, Memory::kBshd);
  const Context context = Context::with_isa(GetParam());
  ASSERT_TRUE(quantize(x.view(), {}, q.codes.view(), q.scale.view(), context).ok());
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Tensor out(dtype, x.shape());
    ASSERT_TRUE(dequantize(q.view({}, false), out.view(), context).ok());
    for (int64_t s = 0; s < 3; ++s) {
      for (int64_t d = 0; d < 20; ++d) EXPECT_EQ(std::isnan(out.get(0, s, 0, d)), s == 1);
    }
  }
}

TEST_P(Dequantize, EmptyTensors) {
  for (const Extents& shape : {Extents{0, 4, 2, 8}, Extents{2, 0, 2, 8}, Extents{2, 4, 2, 0}}) {
    const Tensor x(DType::kFloat32, shape);
    Quantized q = results_for(x, {}, Memory::kBshd);
    Tensor out(DType::kFloat16, shape);
    EXPECT_TRUE(dequantize(q.view({}, true), out.view(), Context::with_isa(GetParam())).ok());
  }
}

}  // namespace
}  // namespace attn8::testing
