// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "failure.hpp"

namespace attn8::app {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

/// Bytes of one element of every type the format knows; 0 for an unknown name.
int64_t element_bytes(std::string_view dtype) {
  static constexpr std::array<std::pair<std::string_view, int64_t>, 14> kTypes = {{{"BOOL", 1},
                                                                                   {"U8", 1},
                                                                                   {"I8", 1},
                                                                                   {"F8_E4M3", 1},
                                                                                   {"F8_E5M2", 1},
                                                                                   {"I16", 2},
                                                                                   {"U16", 2},
                                                                                   {"F16", 2},
                                                                                   {"BF16", 2},
                                                                                   {"I32", 4},
                                                                                   {"U32", 4},
                                                                                   {"F32", 4},
                                                                                   {"F64", 8},
                                                                                   {"I64", 8}}};
  for (const auto& [name, bytes] : kTypes) {
    if (name == dtype) return bytes;
  }
  return dtype == "U64" ? 8 : 0;
}

std::optional<DType> readable_dtype(std::string_view dtype) {
  if (dtype == "F32") return DType::kFloat32;
  if (dtype == "F16") return DType::kFloat16;
  if (dtype == "BF16") return DType::kBFloat16;
  if (dtype == "I8") return DType::kInt8;
  return std::nullopt;
}

/// Non-negative integers below 2^63, or nothing.
std::optional<std::vector<int64_t>> integers(const json& value) {
  if (!value.is_array()) return std::nullopt;
  std::vector<int64_t> result;
  for (const json& item : value) {
    if (!item.is_number_integer() || item.get<int64_t>() < 0) return std::nullopt;
    if (item.is_number_unsigned() && item.get<uint64_t>() > uint64_t{INT64_MAX}) {
      return std::nullopt;
    }
    result.push_back(item.get<int64_t>());
  }
  return result;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& argument, const std::string& path)
    : file_(argument, path) {
  std::array<unsigned char, 8> length = {};
  if (file_.size_bytes() < 8) {
    file_.reject(
        fmt::format("has {} bytes, want a safetensors file of at least 8", file_.size_bytes()));
  }
  file_.read(0, std::as_writable_bytes(std::span(length)));
  uint64_t header_bytes = 0;
  for (size_t i = 8; i-- > 0;) header_bytes = header_bytes << 8 | length[i];
  if (header_bytes > uint64_t{kMaxHeaderBytes} ||
      static_cast<int64_t>(header_bytes) > file_.size_bytes() - 8) {
    file_.reject(fmt::format("header of {} bytes in a file of {}, want one that fits", header_bytes,
                             file_.size_bytes()));
  }
  std::string header(header_bytes, ' ');
  file_.read(8, std::as_writable_bytes(std::span(header)));
  parse_header(header, 8 + static_cast<int64_t>(header_bytes));
}

void SafetensorsFile::parse_header(std::string_view text, int64_t data_begin) {
  std::set<std::string> names;
  std::string repeated;
  const auto on_event = [&](int depth, json::parse_event_t event, const json& parsed) {
    if (depth == 1 && event == json::parse_event_t::key &&
        !names.insert(parsed.get<std::string>()).second) {
      repeated = parsed.get<std::string>();
    }
    return true;
  };
  const json header = json::parse(text, on_event, false);
  if (!header.is_object()) file_.reject("header is not a JSON object, want one");
  if (!repeated.empty()) file_.reject(fmt::format("names '{}' twice, want it once", repeated));

  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) file_.reject("__metadata__ is not an object, want one of strings");
      for (const auto& [key, entry] : value.items()) {
        if (!entry.is_string()) {
          file_.reject(fmt::format("__metadata__ '{}' is not a string, want one", key));
        }
        metadata_[key] = entry.get<std::string>();
      }
      continue;
    }
    if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string() ||
        !value.contains("shape") || !value.contains("data_offsets")) {
      file_.reject(fmt::format("tensor '{}' lacks dtype, shape or data_offsets", name));
    }
    Tensor tensor;
    tensor.dtype = value["dtype"].get<std::string>();
    int64_t bytes = element_bytes(tensor.dtype);
    if (bytes == 0) {
      file_.reject(fmt::format("tensor '{}' has the unknown dtype '{}'", name, tensor.dtype));
    }
    const auto shape = integers(value["shape"]);
    const auto offsets = integers(value["data_offsets"]);
    if (!shape || !offsets || offsets->size() != 2) {
      file_.reject(fmt::format(
          "tensor '{}' has a bad shape or data_offsets, want lists of integers >= 0", name));
    }
    for (const int64_t extent : *shape) {
      if (__builtin_mul_overflow(bytes, extent, &bytes)) {
        file_.reject(
            fmt::format("tensor '{}' of shape ({}) is too large", name, fmt::join(*shape, ", ")));
      }
    }
    const int64_t data_bytes = file_.size_bytes() - data_begin;
    if ((*offsets)[0] > (*offsets)[1] || (*offsets)[1] > data_bytes) {
      file_.reject(fmt::format("tensor '{}' lies at [{}, {}), want it inside the {} data bytes",
                               name, (*offsets)[0], (*offsets)[1], data_bytes));
    }
    if ((*offsets)[1] - (*offsets)[0] != bytes) {
      file_.reject(fmt::format("tensor '{}' has {} bytes, want {} for shape ({}) {}", name,
                               (*offsets)[1] - (*offsets)[0], bytes, fmt::join(*shape, ", "),
                               tensor.dtype));
    }
    tensor.shape = *shape;
    tensor.begin = data_begin + (*offsets)[0];
    tensor.end = data_begin + (*offsets)[1];
    tensors_[name] = std::move(tensor);
  }

  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, tensor] : tensors_) ranges.emplace_back(tensor.begin, tensor.end);
  std::sort(ranges.begin(), ranges.end());
  int64_t position = data_begin;
  for (const auto& [begin, end] : ranges) {
    if (begin != position) {
      file_.reject(fmt::format("has a gap or an overlap at byte {}, want tensors side by side",
                               std::min(begin, position)));
    }
    position = end;
  }
  if (position != file_.size_bytes()) {
    file_.reject(
        fmt::format("has {} bytes after its tensors, want none", file_.size_bytes() - position));
  }
}

HostTensor SafetensorsFile::read(const std::string& name, Layout layout) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) file_.reject(fmt::format("has no tensor '{}'", name));
  const Tensor& tensor = found->second;
  const auto dtype = readable_dtype(tensor.dtype);
  if (!dtype) {
    file_.reject(
        fmt::format("tensor '{}' has dtype {}, want F32, F16, BF16 or I8", name, tensor.dtype));
  }
  if (tensor.shape.size() != 4) {
    file_.reject(fmt::format("tensor '{}' has {} axes, want 4", name, tensor.shape.size()));
  }
  const auto& s = tensor.shape;
  const Extents shape =
      layout == Layout::kBshd ? Extents{s[0], s[1], s[2], s[3]} : Extents{s[0], s[2], s[1], s[3]};
  HostTensor result(*dtype, shape, layout);
  file_.read(tensor.begin, {result.data(), result.size_bytes()});
  return result;
}

std::vector<std::string> SafetensorsFile::qkv_prefixes() const {
  std::vector<std::string> prefixes;
  for (const auto& [name, tensor] : tensors_) {
    if (name != "q" && !name.ends_with(".q")) continue;
    const std::string prefix = name.substr(0, name.size() - 1);
    if (tensors_.contains(prefix + "k") && tensors_.contains(prefix + "v")) {
      prefixes.push_back(prefix);
    }
  }
  return prefixes;
}

std::optional<std::string> SafetensorsFile::find_metadata(const std::string& prefix,
                                                          const std::string& key) const {
  for (const std::string& name : {prefix + key, key}) {
    const auto found = metadata_.find(name);
    if (found != metadata_.end()) return found->second;
  }
  return std::nullopt;
}

}  // namespace attn8::app
