// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/element.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/kernel_case.hpp"

// Both 16-bit types against their definition in float64: sign, exponent, fraction. The kernels'
// own conversions are reached through the public API, so that each ISA's instructions are tested.

namespace attn8::testing {
namespace {

/// A 16-bit IEEE format and the functions under test.
struct Format {
  DType dtype;
  int fraction_bits;
  int bias;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);

  [[nodiscard]] uint16_t inf() const {
    return static_cast<uint16_t>(((2 * bias + 1) << fraction_bits));
  }
  /// Value of a code without its sign; the code of Inf has the value it would have if exponents
  /// went on, where rounding to nearest turns into overflow.
  [[nodiscard]] double value(int magnitude) const {
    const int exponent = magnitude >> fraction_bits;
    const int fraction = magnitude & ((1 << fraction_bits) - 1);
    if (exponent == 0) return std::ldexp(fraction, 1 - bias - fraction_bits);
    return std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  }
};

const Format kFormats[] = {
    {DType::kFloat16, 10, 15, float16_to_float, float_to_float16},
    {DType::kBFloat16, 7, 127, bfloat16_to_float, float_to_bfloat16},
};

bool is_nan_code(const Format& format, int code) { return (code & 0x7fff) > format.inf(); }

/// A float and the code it rounds to.
struct Rounding {
  float x;
  uint16_t code;
};

/// Every finite code, every midpoint of neighbours and the floats next to it, of both signs.
std::vector<Rounding> roundings(const Format& format) {
  std::vector<Rounding> all;
  const auto add = [&](double x, int code) {
    const auto narrow = static_cast<float>(x);
    EXPECT_EQ(static_cast<double>(narrow), x) << "not a float";
    all.push_back({narrow, static_cast<uint16_t>(code)});
    all.push_back({-narrow, static_cast<uint16_t>(code | 0x8000)});
  };
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int code = 0; code < format.inf(); ++code) {
    const double low = format.value(code);
    const double middle = (low + format.value(code + 1)) / 2;
    const auto tie = static_cast<float>(middle);
    add(low, code);
    add(middle, code % 2 == 0 ? code : code + 1);
    add(static_cast<double>(std::nextafter(tie, 0.0f)), code);
    if (tie < std::numeric_limits<float>::max()) {
      add(static_cast<double>(std::nextafter(tie, kInf)), code + 1);
    }
  }
  add(static_cast<double>(std::numeric_limits<float>::max()), format.inf());
  add(static_cast<double>(std::numeric_limits<float>::denorm_min()), 0);
  all.push_back({kInf, format.inf()});
  all.push_back({-kInf, static_cast<uint16_t>(format.inf() | 0x8000)});
  return all;
}

TEST(Element, EveryCodeWidensToItsValue) {
  for (const Format& format : kFormats) {
    for (int code = 0; code < 65536; ++code) {
      const float got = format.widen(static_cast<uint16_t>(code));
      ASSERT_EQ(std::signbit(got), (code & 0x8000) != 0) << to_string(format.dtype) << " " << code;
      if (is_nan_code(format, code)) {
        ASSERT_TRUE(std::isnan(got)) << to_string(format.dtype) << " " << code;
        continue;
      }
      const int magnitude = code & 0x7fff;
      const double wanted = magnitude == format.inf() ? std::numeric_limits<double>::infinity()
                                                      : format.value(magnitude);
      ASSERT_EQ(std::fabs(static_cast<double>(got)), wanted)
          << to_string(format.dtype) << " " << code;
    }
  }
}

TEST(Element, EveryCodeComesBack) {
  for (const Format& format : kFormats) {
    for (int code = 0; code < 65536; ++code) {
      const uint16_t got = format.narrow(format.widen(static_cast<uint16_t>(code)));
      if (is_nan_code(format, code)) {
        ASSERT_TRUE(is_nan_code(format, got)) << to_string(format.dtype) << " " << code;
      } else {
        ASSERT_EQ(got, code) << to_string(format.dtype);
      }
    }
  }
}

TEST(Element, RoundsToNearestEven) {
  for (const Format& format : kFormats) {
    for (const Rounding& r : roundings(format)) {
      ASSERT_EQ(format.narrow(r.x), r.code) << to_string(format.dtype) << " of " << r.x;
    }
  }
}

/// Every NaN, also one whose payload lies in the bits that narrowing drops.
TEST(Element, NansStayNans) {
  for (const Format& format : kFormats) {
    for (int bit = 0; bit < 23; ++bit) {
      for (const uint32_t sign : {0u, 0x80000000u}) {
        const uint32_t bits = sign | 0x7f800000u | 1u << bit;
        EXPECT_TRUE(is_nan_code(format, format.narrow(std::bit_cast<float>(bits))))
            << to_string(format.dtype) << " bits " << bits;
      }
    }
  }
}

class ElementOfIsa : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(ElementOfIsa);

/// What a kernel loads: with one key the output is V. Rows of 256 channels and, for the loops
/// after the last vector, of 7.
TEST_P(ElementOfIsa, LoadsEveryFiniteCode) {
  for (const Format& format : kFormats) {
    for (const int64_t dim : {256, 7}) {
      const int64_t count = 2 * int64_t{format.inf()};
      const int64_t batch = (count + dim - 1) / dim;
      const auto code_at = [&](int64_t i) {
        const int64_t code = i % count;
        return static_cast<uint16_t>(code < format.inf() ? code : code - format.inf() + 0x8000);
      };
      std::vector<uint16_t> v(static_cast<size_t>(batch * dim));
      for (size_t i = 0; i < v.size(); ++i) v[i] = code_at(static_cast<int64_t>(i));
      const Extents shape = {batch, 1, 1, dim};
      std::vector<float> out(v.size());
      const std::vector<float> zeros(v.size());
      AttentionOptions options;
      options.mode = Mode::kExact;
      const ConstTensorView q = bshd(zeros.data(), DType::kFloat32, shape);
      const Status status = attention({q, q, bshd(v.data(), format.dtype, shape)},
                                      {bshd(out.data(), DType::kFloat32, shape)}, options,
                                      Context::with_isa(GetParam()));
      ASSERT_TRUE(status.ok()) << status.message();
      for (size_t i = 0; i < v.size(); ++i) {
        const double magnitude = format.value(v[i] & 0x7fff);
        ASSERT_EQ(static_cast<double>(out[i]), v[i] & 0x8000 ? -magnitude : magnitude)
            << to_string(format.dtype) << " code " << v[i] << " dim " << dim;
      }
    }
  }
}

/// What a kernel stores: code 1 times any channel scale, one row of 7 and one of all.
TEST_P(ElementOfIsa, StoresRoundedToNearestEven) {
  for (const Format& format : kFormats) {
    const std::vector<Rounding> all = roundings(format);
    for (const int64_t dim : {static_cast<int64_t>(all.size()), int64_t{7}}) {
      const int64_t batch = static_cast<int64_t>(all.size()) / dim;
      const auto count = static_cast<size_t>(batch * dim);
      std::vector<float> scale(count);
      for (size_t i = 0; i < count; ++i) scale[i] = all[i].x;
      const std::vector<int8_t> codes(count, 1);
      std::vector<uint16_t> out(count);
      const Extents shape = {batch, 1, 1, dim};
      const Status status =
          dequantize({bshd(codes.data(), DType::kInt8, shape),
                      bshd(scale.data(), DType::kFloat32, shape),
                      {Granularity::kChannel, 0}},
                     bshd(out.data(), format.dtype, shape), Context::with_isa(GetParam()));
      ASSERT_TRUE(status.ok()) << status.message();
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(out[i], all[i].code) << to_string(format.dtype) << " of " << all[i].x;
      }
    }
  }
}

}  // namespace
}  // namespace attn8::testing
