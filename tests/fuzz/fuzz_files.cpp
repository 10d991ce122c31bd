// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Bytes as the files that the command line reads: .npy, safetensors, captured tensors.
// Each is read or refused as bad input with a line that names the flag; whatever was read is all
// there.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

#include "failure.hpp"
#include "fuzz_target.hpp"
#include "npy.hpp"
#include "real_tensors.hpp"
#include "safetensors.hpp"

namespace attn8::fuzz {
namespace {

using namespace app;  // NOLINT: what is under test

/// Bytes under a name that open() takes, without a disk.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : descriptor_(memfd_create("fuzz", 0)) {
    const bool written =
        descriptor_ >= 0 && write(descriptor_, data, size) == static_cast<ssize_t>(size);
    expect(written, "memfd_create");
  }
  ~MemoryFile() { close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  [[nodiscard]] std::string path() const { return fmt::format("/proc/self/fd/{}", descriptor_); }

 private:
  int descriptor_;
};

/// Reads every element of a tensor, for AddressSanitizer to see.
void read_all(const ConstTensorView& x) {
  const size_t size = dtype_bytes(x.dtype);
  int64_t zeros = 0;
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t s = 0; s < x.shape[1]; ++s) {
      for (int64_t h = 0; h < x.shape[2]; ++h) {
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          const std::byte* element = element_address(x, b, s, h, d);
          zeros += std::count(element, element + size, std::byte{0});
        }
      }
    }
  }
  expect(zeros <= element_count(x.shape) * static_cast<int64_t>(size), "more zeros than bytes");
}

void read_as(uint8_t format, const std::string& path) {
  switch (format % 4) {
    case 0: {
      const NpyArray array = read_npy("--q", path);
      int64_t elements = 1;
      for (const int64_t extent : array.shape) {
        expect(extent >= 0, "an extent below 0");
        elements *= extent;
      }
      expect(array.bytes.size() >= static_cast<size_t>(elements) * dtype_bytes(array.dtype),
             "fewer bytes than elements");
      return;
    }
    case 1: {
      const Layout layout = format & 4 ? Layout::kBhsd : Layout::kBshd;
      const HostTensor tensor = read_npy_tensor("--q", path, layout);
      return read_all(tensor.view());
    }
    case 2: {
      const SafetensorsFile file("--qkv", path);
      for (const auto& [name, tensor] : file.tensors()) {
        if (tensor.shape.size() == 4 && tensor.dtype == "F32") {
          const HostTensor read = file.read(name);
          read_all(read.view());
        }
      }
      return;
    }
    default: {
      const RealTensors tensors("--data", path);
      for (size_t i = 0; i < tensors.size(); ++i) {
        const RealEntry entry = tensors.read(i);
        for (const HostTensor* tensor : {&entry.qkv.q, &entry.qkv.k, &entry.qkv.v}) {
          read_all(tensor->view());
        }
      }
    }
  }
}

Bytes npy(std::string_view format, std::string_view header, size_t data_bytes) {
  std::string text(format);
  text += "\x93NUMPY";
  text += '\x01';
  text += '\x00';
  text += static_cast<char>(header.size() & 0xff);
  text += static_cast<char>(header.size() >> 8);
  text += header;
  text.append(data_bytes, '?');
  return {text.begin(), text.end()};
}

Bytes safetensors(std::string_view format, std::string_view header, size_t data_bytes) {
  std::string text(format);
  for (int shift = 0; shift < 64; shift += 8) {
    text += static_cast<char>(uint64_t{header.size()} >> shift & 0xff);
  }
  text += header;
  text.append(data_bytes, '?');
  return {text.begin(), text.end()};
}

}  // namespace

std::vector<Bytes> seeds() {
  const std::string_view qkv =
      R"({"__metadata__":{"a.softmax_scale":"0.5","a.causal":"true","layout":"bhsd"},)"
      R"("a.q":{"dtype":"F32","shape":[1,2,1,2],"data_offsets":[0,16]},)"
      R"("a.k":{"dtype":"F16","shape":[1,2,1,2],"data_offsets":[16,24]},)"
      R"("a.v":{"dtype":"BF16","shape":[1,2,1,2],"data_offsets":[24,32]}})";
  std::vector<Bytes> all;
  for (const std::string_view format : {"\x01", "\x05", "\x04"}) {
    all.push_back(
        npy(format, "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 1, 3), }\n", 24));
    all.push_back(
        npy(format, "{'descr': '<f2', 'fortran_order': True, 'shape': (2, 1, 2, 1), }\n", 8));
  }
  for (const std::string_view format : {"\x02", "\x03"}) {
    all.push_back(safetensors(format, qkv, 32));
  }
  return all;
}

}  // namespace attn8::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace attn8;  // NOLINT: this is the target
  if (size == 0) return -1;
  const fuzz::MemoryFile file(data + 1, size - 1);
  try {
    fuzz::read_as(data[0], file.path());
    return 0;
  } catch (const app::Failure& failure) {
    fuzz::expect(failure.status().code() == StatusCode::kInvalidArgument &&
                     failure.status().message().starts_with("--"),
                 "answers '" + failure.status().message() + "'");
  } catch (const std::exception& error) {
    fuzz::finding(std::string("throws ") + error.what());
  }
  return -1;
}
