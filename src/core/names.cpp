// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "attn8/attn8.hpp"

namespace attn8 {
namespace {

template <class E>
using Names = std::pair<E, std::string_view>;

constexpr std::array<Names<Isa>, 4> kIsaNames = {{{Isa::kScalar, "scalar"},
                                                  {Isa::kAvx2, "avx2"},
                                                  {Isa::kAvxVnni, "avx_vnni"},
                                                  {Isa::kAvx512Vnni, "avx512_vnni"}}};
constexpr std::array<Names<Mode>, 5> kModeNames = {{{Mode::kAccurate, "accurate"},
                                                    {Mode::kPaper, "paper"},
                                                    {Mode::kHalf, "half"},
                                                    {Mode::kExact, "exact"},
                                                    {Mode::kFp8, "fp8"}}};
constexpr std::array<Names<Granularity>, 5> kGranularityNames = {
    {{Granularity::kToken, "token"},
     {Granularity::kTensor, "tensor"},
     {Granularity::kChannel, "channel"},
     {Granularity::kBlock, "block"},
     {Granularity::kBlockChannel, "block_channel"}}};
constexpr std::array<Names<DType>, 6> kDTypeNames = {{{DType::kFloat32, "float32"},
                                                      {DType::kFloat16, "float16"},
                                                      {DType::kBFloat16, "bfloat16"},
                                                      {DType::kInt8, "int8"},
                                                      {DType::kInt32, "int32"},
                                                      {DType::kBool, "bool"}}};
constexpr std::array<Names<StatusCode>, 7> kStatusCodeNames = {
    {{StatusCode::kOk, "Ok"},
     {StatusCode::kInvalidArgument, "InvalidArgument"},
     {StatusCode::kUnsupported, "Unsupported"},
     {StatusCode::kUnavailable, "Unavailable"},
     {StatusCode::kOutOfMemory, "OutOfMemory"},
     {StatusCode::kDeviceError, "DeviceError"},
     {StatusCode::kInternal, "Internal"}}};

template <class E, size_t N>
std::string_view name_of(const std::array<Names<E>, N>& names, E value) noexcept {
  for (const auto& [key, name] : names) {
    if (key == value) return name;
  }
  return "?";
}

template <class E, size_t N>
Result<E> parse(const std::array<Names<E>, N>& names, std::string_view argument,
                std::string_view text) noexcept {
  for (const auto& [key, name] : names) {
    if (name == text) return key;
  }
  try {
    std::string message =
        std::string(argument) + " got \"" + std::string(text) + "\", wants one of";
    for (const auto& [key, name] : names) message += " " + std::string(name);
    return Status(StatusCode::kInvalidArgument, std::move(message));
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

}  // namespace

std::string_view to_string(Isa isa) noexcept { return name_of(kIsaNames, isa); }
std::string_view to_string(Mode mode) noexcept { return name_of(kModeNames, mode); }
std::string_view to_string(DType dtype) noexcept { return name_of(kDTypeNames, dtype); }
std::string_view to_string(StatusCode code) noexcept { return name_of(kStatusCodeNames, code); }
std::string_view to_string(Granularity granularity) noexcept {
  return name_of(kGranularityNames, granularity);
}

Result<Isa> parse_isa(std::string_view name) noexcept { return parse(kIsaNames, "isa", name); }
Result<Mode> parse_mode(std::string_view name) noexcept { return parse(kModeNames, "mode", name); }
Result<Granularity> parse_granularity(std::string_view name) noexcept {
  return parse(kGranularityNames, "v_granularity", name);
}

std::string_view version() noexcept { return ATTN8_VERSION; }

Extents scale_shape(const Extents& x, const QuantSpec& spec) noexcept {
  const int64_t blocks = spec.block > 0 ? (x[1] + spec.block - 1) / spec.block : 0;
  switch (spec.granularity) {
    case Granularity::kToken:
      return {x[0], x[1], x[2], 1};
    case Granularity::kTensor:
      return {x[0], 1, x[2], 1};
    case Granularity::kChannel:
      return {x[0], 1, x[2], x[3]};
    case Granularity::kBlock:
      return {x[0], blocks, x[2], 1};
    case Granularity::kBlockChannel:
      return {x[0], blocks, x[2], x[3]};
  }
  return {0, 0, 0, 0};
}

}  // namespace attn8
