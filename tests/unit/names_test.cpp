// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/attn8.hpp"

namespace attn8::testing {
namespace {

template <class E, class Parse>
void expect_names(const std::vector<std::string_view>& names, Parse parse) {
  for (size_t i = 0; i < names.size(); ++i) {
    const E value = static_cast<E>(i);
    EXPECT_EQ(to_string(value), names[i]);
    const Result<E> parsed = parse(names[i]);
    ASSERT_TRUE(parsed.ok()) << names[i];
    EXPECT_EQ(parsed.value(), value) << names[i];
  }
  EXPECT_EQ(to_string(static_cast<E>(names.size())), "?");
  EXPECT_EQ(to_string(static_cast<E>(255)), "?");
  for (const std::string& wrong :
       {std::string(), std::string("?"), std::string(names[0]) + " ",
        std::string(names[0]).substr(1), std::string(names[0]) + '\0', std::string("SCALAR")}) {
    const Result<E> parsed = parse(wrong);
    ASSERT_FALSE(parsed.ok()) << wrong;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
    for (const std::string_view name : names) {
      EXPECT_NE(parsed.status().message().find(name), std::string::npos)
          << parsed.status().message() << " does not list " << name;
    }
  }
}

TEST(Names, RoundTrip) {
  expect_names<Isa>({"scalar", "avx2", "avx_vnni", "avx512_vnni"}, parse_isa);
  expect_names<Mode>({"accurate", "paper", "half", "exact", "fp8"}, parse_mode);
  expect_names<Granularity>({"token", "tensor", "channel", "block", "block_channel"},
                            parse_granularity);
}

TEST(Names, ParseErrorsNameGotAndWanted) {
  EXPECT_EQ(parse_isa("sse").status().message(),
            "isa got \"sse\", wants one of scalar avx2 avx_vnni avx512_vnni");
  EXPECT_EQ(parse_mode("int4").status().message(),
            "mode got \"int4\", wants one of accurate paper half exact fp8");
  EXPECT_EQ(parse_granularity("row").status().message(),
            "v_granularity got \"row\", wants one of token tensor channel block block_channel");
}

TEST(Names, OfTypesAndCodes) {
  EXPECT_EQ(to_string(DType::kFloat32), "float32");
  EXPECT_EQ(to_string(DType::kFloat16), "float16");
  EXPECT_EQ(to_string(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(to_string(DType::kInt8), "int8");
  EXPECT_EQ(to_string(DType::kInt32), "int32");
  EXPECT_EQ(to_string(DType::kBool), "bool");
  EXPECT_EQ(to_string(static_cast<DType>(6)), "?");
  EXPECT_EQ(to_string(StatusCode::kOk), "Ok");
  EXPECT_EQ(to_string(StatusCode::kInvalidArgument), "InvalidArgument");
  EXPECT_EQ(to_string(StatusCode::kUnsupported), "Unsupported");
  EXPECT_EQ(to_string(StatusCode::kUnavailable), "Unavailable");
  EXPECT_EQ(to_string(StatusCode::kOutOfMemory), "OutOfMemory");
  EXPECT_EQ(to_string(StatusCode::kDeviceError), "DeviceError");
  EXPECT_EQ(to_string(StatusCode::kInternal), "Internal");
  EXPECT_EQ(to_string(static_cast<StatusCode>(-1)), "?");
}

/// Bytes of a type are what its name says; a value outside the enumeration has none.
TEST(Names, BytesOfTypes) {
  EXPECT_EQ(dtype_bytes(DType::kFloat32), 4u);
  EXPECT_EQ(dtype_bytes(DType::kFloat16), 2u);
  EXPECT_EQ(dtype_bytes(DType::kBFloat16), 2u);
  EXPECT_EQ(dtype_bytes(DType::kInt8), 1u);
  EXPECT_EQ(dtype_bytes(DType::kInt32), 4u);
  EXPECT_EQ(dtype_bytes(static_cast<DType>(9)), 0u);
}

TEST(Names, VersionHasThreeNumbers) {
  const std::string_view text = version();
  EXPECT_EQ(std::count(text.begin(), text.end(), '.'), 2) << text;
  for (const char c : text) EXPECT_TRUE(c == '.' || (c >= '0' && c <= '9')) << text;
  EXPECT_TRUE(!text.empty() && text.front() != '.' && text.back() != '.') << text;
}

/// Every ISA once, best first; one can always run, and only those that cannot have a reason.
TEST(IsaSupport, ListsEveryIsaBestFirst) {
  const std::span<const IsaSupport> all = isa_support();
  ASSERT_EQ(all.size(), 4u);
  EXPECT_EQ(all[0].isa, Isa::kAvx512Vnni);
  EXPECT_EQ(all[1].isa, Isa::kAvxVnni);
  EXPECT_EQ(all[2].isa, Isa::kAvx2);
  EXPECT_EQ(all[3].isa, Isa::kScalar);
  EXPECT_TRUE(all[3].available);
  for (const IsaSupport& support : all) {
    EXPECT_EQ(support.available, support.reason.empty()) << to_string(support.isa);
  }
  const auto first = std::find_if(all.begin(), all.end(),
                                  [](const IsaSupport& support) { return support.available; });
  EXPECT_EQ(best_isa(), first->isa);
  EXPECT_EQ(isa_support().data(), all.data()) << "not static storage";
}

TEST(ScaleShape, OfEveryGranularity) {
  const Extents x = {2, 10, 3, 5};
  EXPECT_EQ(scale_shape(x, {Granularity::kToken, 0}), (Extents{2, 10, 3, 1}));
  EXPECT_EQ(scale_shape(x, {Granularity::kTensor, 0}), (Extents{2, 1, 3, 1}));
  EXPECT_EQ(scale_shape(x, {Granularity::kChannel, 0}), (Extents{2, 1, 3, 5}));
  EXPECT_EQ(scale_shape(x, {Granularity::kBlock, 4}), (Extents{2, 3, 3, 1}));
  EXPECT_EQ(scale_shape(x, {Granularity::kBlock, 5}), (Extents{2, 2, 3, 1}));
  EXPECT_EQ(scale_shape(x, {Granularity::kBlock, 2147483647}), (Extents{2, 1, 3, 1}));
  EXPECT_EQ(scale_shape(x, {Granularity::kBlockChannel, 10}), (Extents{2, 1, 3, 5}));
  EXPECT_EQ(scale_shape(x, {Granularity::kBlockChannel, 1}), (Extents{2, 10, 3, 5}));
  EXPECT_EQ(scale_shape({2, 0, 3, 5}, {Granularity::kBlock, 4}), (Extents{2, 0, 3, 1}));
  EXPECT_EQ(scale_shape({2, 0, 3, 5}, {Granularity::kTensor, 0}), (Extents{2, 1, 3, 1}));
}

}  // namespace
}  // namespace attn8::testing
