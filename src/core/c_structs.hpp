// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "attn8/context.hpp"
#include "attn8/status.hpp"
#include "core/message.hpp"

/// Structs of attn8.h, which begin with the size that the caller was compiled with.
namespace attn8::c_structs {

/// Every field of these structs lies within 8 aligned bytes: a size that is a multiple of 8 cuts
/// none of them in two.
inline constexpr uint32_t kUnit = 8;
/// No release has structs near this size: what claims to be larger is not a struct of attn8.h.
inline constexpr uint32_t kLargest = 4096;

inline Status check_size(std::string_view name, uint32_t size, size_t least) {
  if (size < least || size % kUnit != 0 || size > kLargest) {
    return invalid(name, ".struct_size got ", size, ", wants a multiple of 8 in [", least, ", ",
                   kLargest, "]");
  }
  return {};
}

/// Copies what the caller's struct has over the defaults in `out`. `least`: the size of the struct
/// without the fields that have a default.
template <class T>
Status read(std::string_view name, const T* in, size_t least, T& out) {
  static_assert(sizeof(T) % kUnit == 0);
  if (in == nullptr) return invalid(name, " got NULL");
  const uint32_t size = in->struct_size;
  ATTN8_RETURN_IF_ERROR(check_size(name, size, least));
  const auto* bytes = reinterpret_cast<const unsigned char*>(in);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return failure(StatusCode::kUnsupported, name, " sets a field at byte ", i, " that version ",
                     version(), " does not have");
    }
  }
  std::memcpy(&out, in, std::min<size_t>(size, sizeof(T)));
  return {};
}

/// Fills in the fields after the first `kUnit` bytes as far as the caller's struct has them.
template <class T>
void write(const T& value, T* out) noexcept {
  auto* bytes = reinterpret_cast<unsigned char*>(out);
  const size_t size = out->struct_size;
  const size_t known = std::min(size, sizeof(T));
  std::memcpy(bytes + kUnit, reinterpret_cast<const unsigned char*>(&value) + kUnit, known - kUnit);
  std::memset(bytes + known, 0, size - known);
}

/// Default values into a struct of that size.
template <class T>
Status initialize(std::string_view name, T value, T* out, uint32_t struct_size, size_t least) {
  if (out == nullptr) return invalid(name, " got NULL");
  ATTN8_RETURN_IF_ERROR(check_size(name, struct_size, least));
  value.struct_size = struct_size;
  std::memcpy(static_cast<void*>(out), &value, kUnit);
  write(value, out);
  return {};
}

inline Status check_reserved(std::string_view name, int32_t reserved) {
  if (reserved != 0) return invalid(name, ".reserved got ", reserved, ", wants 0");
  return {};
}

/// The enumerator of a number; what the enumeration cannot hold becomes one it does not have, which
/// the C++ API refuses.
template <class E>
E enumerator(int32_t number) noexcept {
  return static_cast<E>(number < 0 || number > 255 ? 255 : number);
}

}  // namespace attn8::c_structs
