// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "npy.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <charconv>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>

#include "failure.hpp"

namespace attn8::app {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr int64_t kMaxHeaderBytes = 65536;  // numpy writes 128; more is a broken length field

/// Reads the Python dictionary literal of the header, in any order of its three keys.
class HeaderParser {
 public:
  HeaderParser(const InputFile& file, std::string_view text) : file_(file), text_(text) {}

  void parse(NpyArray& array) {
    expect('{');
    while (!accept('}')) {
      const std::string_view key = string();
      expect(':');
      if (key == "descr" && !descr_) {
        descr_ = string();
      } else if (key == "fortran_order" && !order_) {
        order_ = boolean();
      } else if (key == "shape" && !shape_) {
        shape_ = tuple();
      } else {
        bad(fmt::format("key '{}'", key));
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (!text_.empty()) bad("text after the dictionary");
    if (!descr_ || !order_ || !shape_) bad("a missing key");
    if (*descr_ == "<f4") {
      array.dtype = DType::kFloat32;
    } else if (*descr_ == "<f2") {
      array.dtype = DType::kFloat16;
    } else if (*descr_ == "|b1") {
      array.dtype = DType::kBool;
    } else {
      file_.reject(fmt::format("dtype '{}', want '<f4' (float32), '<f2' (float16) or '|b1' (bool)",
                               *descr_));
    }
    array.fortran_order = *order_;
    array.shape = *shape_;
  }

 private:
  [[noreturn]] void bad(const std::string& what) const {
    file_.reject(fmt::format(
        "header holds {}, want a dictionary of 'descr', 'fortran_order' and 'shape'", what));
  }
  void skip_space() {
    while (!text_.empty() && (text_.front() == ' ' || text_.front() == '\n')) {
      text_.remove_prefix(1);
    }
  }
  bool accept(char c) {
    skip_space();
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c)) bad(fmt::format("no '{}' where one belongs", c));
  }
  std::string_view string() {
    expect('\'');
    const size_t end = text_.find('\'');
    if (end == std::string_view::npos) bad("an unfinished string");
    const std::string_view value = text_.substr(0, end);
    text_.remove_prefix(end + 1);
    return value;
  }
  bool boolean() {
    skip_space();
    for (const std::string_view word : {"True", "False"}) {
      if (text_.starts_with(word)) {
        text_.remove_prefix(word.size());
        return word == "True";
      }
    }
    bad("no True or False for 'fortran_order'");
  }
  std::vector<int64_t> tuple() {
    std::vector<int64_t> values;
    expect('(');
    while (!accept(')')) {
      skip_space();
      int64_t value = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
      if (error != std::errc()) bad("a shape that is not a tuple of integers");
      text_.remove_prefix(static_cast<size_t>(end - text_.data()));
      values.push_back(value);
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return values;
  }

  const InputFile& file_;
  std::string_view text_;
  std::optional<std::string_view> descr_;
  std::optional<bool> order_;
  std::optional<std::vector<int64_t>> shape_;
};

int64_t data_bytes(const InputFile& file, const NpyArray& array) {
  int64_t count = 1;
  for (const int64_t extent : array.shape) {
    if (extent < 0) {
      file.reject(
          fmt::format("shape ({}), want extents of at least 0", fmt::join(array.shape, ", ")));
    }
  }
  for (const int64_t extent : array.shape) {
    // 2^48 elements are beyond every machine's memory and far from overflowing when multiplied by
    // the size of an element.
    if (__builtin_mul_overflow(count, extent, &count) || count > (int64_t{1} << 48)) {
      file.reject(fmt::format("shape ({}) has too many elements, want at most 2^48",
                              fmt::join(array.shape, ", ")));
    }
  }
  return count * static_cast<int64_t>(dtype_bytes(array.dtype));
}

/// Where axis a of the logical order [batch, seq, head, dim] stands in a file of that layout.
constexpr std::array<size_t, 4> file_axes(Layout layout) {
  return layout == Layout::kBshd ? std::array<size_t, 4>{0, 1, 2, 3}
                                 : std::array<size_t, 4>{0, 2, 1, 3};
}

}  // namespace

NpyArray read_npy(const std::string& argument, const std::string& path) {
  const InputFile file(argument, path);
  std::array<unsigned char, 12> head = {};
  const auto head_bytes = static_cast<size_t>(std::min<int64_t>(file.size_bytes(), 12));
  file.read(0, std::as_writable_bytes(std::span(head).first(head_bytes)));
  if (head_bytes < 10 || std::memcmp(head.data(), kMagic.data(), kMagic.size()) != 0) {
    file.reject("does not begin as a .npy file, want a NumPy array of format 1.0 or 2.0");
  }
  const int major = head[6];
  if ((major != 1 && major != 2) || head[7] != 0 || head_bytes < 12) {
    file.reject(fmt::format("format {}.{}, want 1.0 or 2.0", major, head[7]));
  }
  int64_t header_bytes = head[8] | head[9] << 8;
  if (major == 2) header_bytes |= int64_t{head[10]} << 16 | int64_t{head[11]} << 24;
  const int64_t header_begin = major == 1 ? 10 : 12;
  if (header_bytes > kMaxHeaderBytes) {
    file.reject(fmt::format("header of {} bytes, want at most {}", header_bytes, kMaxHeaderBytes));
  }
  std::string header(static_cast<size_t>(header_bytes), ' ');
  file.read(header_begin, std::as_writable_bytes(std::span(header)));

  NpyArray array;
  HeaderParser(file, header).parse(array);
  if (array.shape.empty() || array.shape.size() > 4) {
    file.reject(fmt::format("has {} axes, want 1 to 4", array.shape.size()));
  }
  const int64_t want = data_bytes(file, array);
  const int64_t got = file.size_bytes() - header_begin - header_bytes;
  if (got != want) {
    file.reject(fmt::format("{}: {} bytes of data, want {} for shape ({}) {}",
                            got < want ? "is truncated" : "has trailing data", got, want,
                            fmt::join(array.shape, ", "), to_string(array.dtype)));
  }
  array.bytes = AlignedBytes(static_cast<size_t>(want));
  file.read(header_begin + header_bytes, array.bytes.span());
  return array;
}

namespace {

[[noreturn]] void reject_array(const std::string& argument, const std::string& path,
                               const NpyArray& array, std::string_view want) {
  fail(StatusCode::kInvalidArgument,
       fmt::format("{}: '{}': has {} axes of {}, want {}", argument, path, array.shape.size(),
                   to_string(array.dtype), want));
}

HostTensor with_axes(NpyArray array, Layout layout) {
  Extents file_strides = {};
  int64_t stride = 1;
  for (size_t step = 0; step < 4; ++step) {
    const size_t axis = array.fortran_order ? step : 3 - step;
    file_strides[axis] = stride;
    stride *= array.shape[axis];
  }
  Extents shape = {};
  Extents strides = {};
  for (size_t axis = 0; axis < 4; ++axis) {
    shape[axis] = array.shape[file_axes(layout)[axis]];
    strides[axis] = file_strides[file_axes(layout)[axis]];
  }
  return {std::move(array.bytes), array.dtype, shape, strides};
}

}  // namespace

HostTensor read_npy_tensor(const std::string& argument, const std::string& path, Layout layout) {
  NpyArray array = read_npy(argument, path);
  if (array.shape.size() != 4 || array.dtype == DType::kBool) {
    reject_array(argument, path, array,
                 layout == Layout::kBshd ? "4 of floats: [batch, seq, head, dim]"
                                         : "4 of floats: [batch, head, seq, dim]");
  }
  return with_axes(std::move(array), layout);
}

HostTensor read_npy_mask(const std::string& argument, const std::string& path) {
  NpyArray array = read_npy(argument, path);
  if (array.shape.size() != 4) {
    reject_array(argument, path, array, "4: [batch, head, seqlen_q, seqlen_k]");
  }
  return with_axes(std::move(array), Layout::kBhsd);
}

HostTensor read_npy_heads(const std::string& argument, const std::string& path) {
  NpyArray array = read_npy(argument, path);
  const size_t axes = array.shape.size();
  if (axes > 2 || array.dtype != DType::kFloat32) {
    reject_array(argument, path, array, "1 of float32: [head], or 2: [batch, head]");
  }
  array.shape = {axes == 2 ? array.shape[0] : 1, 1, array.shape[axes - 1], 1};
  return with_axes(std::move(array), Layout::kBshd);
}

void write_npy(const OutputFile& file, const ConstTensorView& x, Layout layout, int axes) {
  const auto order = file_axes(layout);
  std::vector<int64_t> shape;
  for (int axis = 0; axis < axes; ++axis)
    shape.push_back(x.shape[order[static_cast<size_t>(axis)]]);
  std::string header =
      fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}",
                  x.dtype == DType::kFloat32 ? "<f4" : "<f2", fmt::join(shape, ", "));
  // Magic, version, length, text and a newline fill a multiple of 64 bytes.
  const size_t total = (10 + header.size() + 1 + 63) / 64 * 64;
  header.resize(total - 11, ' ');
  header += '\n';
  std::string preamble(kMagic);
  preamble += {'\x01', '\x00', static_cast<char>(header.size() & 0xFF),
               static_cast<char>(header.size() >> 8)};

  const size_t element = dtype_bytes(x.dtype);
  std::string data(static_cast<size_t>(element_count(x.shape)) * element, '\0');
  char* out = data.data();
  std::array<int64_t, 4> index = {};
  const auto extent = [&](size_t axis) { return x.shape[order[axis]]; };
  for (index[0] = 0; index[0] < extent(0); ++index[0]) {
    for (index[1] = 0; index[1] < extent(1); ++index[1]) {
      for (index[2] = 0; index[2] < extent(2); ++index[2]) {
        for (index[3] = 0; index[3] < extent(3); ++index[3]) {
          std::memcpy(out,
                      element_address(x, index[order[0]], index[order[1]], index[order[2]],
                                      index[order[3]]),
                      element);
          out += element;
        }
      }
    }
  }
  const std::array<std::string_view, 3> parts = {preamble, header, data};
  file.write(parts);
}

}  // namespace attn8::app
