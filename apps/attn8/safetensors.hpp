// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/tensor.hpp"
#include "file.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// A safetensors file: its header in memory, its tensors read one by one. F32, F16, BF16 and I8
/// tensors can be read; others may stand in the file. Every failure is kInvalidArgument and names
/// `argument`, the flag the path came from.
class SafetensorsFile {
 public:
  /// Reads and checks the header: sizes, types, and that the tensors fill the data without gap or
  /// overlap.
  SafetensorsFile(const std::string& argument, const std::string& path);

  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t begin = 0;  ///< first byte in the file
    int64_t end = 0;
  };

  [[nodiscard]] const std::map<std::string, Tensor>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const noexcept {
    return metadata_;
  }
  /// A four-axis tensor, [batch, seq, head, dim] dense in the order of `layout`.
  [[nodiscard]] HostTensor read(const std::string& tensor, Layout layout = Layout::kBshd) const;
  /// The "layer.03." of every triple "layer.03.q", "layer.03.k", "layer.03.v", sorted; "" for
  /// plain "q", "k", "v".
  [[nodiscard]] std::vector<std::string> qkv_prefixes() const;
  /// metadata()[prefix + key], else metadata()[key], else nothing.
  [[nodiscard]] std::optional<std::string> find_metadata(const std::string& prefix,
                                                         const std::string& key) const;
  [[nodiscard]] const InputFile& file() const noexcept { return file_; }

 private:
  void parse_header(std::string_view text, int64_t data_begin);

  InputFile file_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace attn8::app
