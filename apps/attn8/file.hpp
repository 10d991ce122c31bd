// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace attn8::app {

/// A regular file open for reading. Failures are kInvalidArgument and name `argument`, the flag the
/// path came from.
class InputFile {
 public:
  InputFile(std::string argument, std::string path);
  ~InputFile();
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&&) = delete;

  [[nodiscard]] int64_t size_bytes() const noexcept { return size_bytes_; }
  /// Fills `into` from byte `offset` on; a file that ends earlier is a failure.
  void read(int64_t offset, std::span<std::byte> into) const;
  /// "--q: 'path'", the beginning of every message about this file.
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  /// Throws kInvalidArgument "--q: 'path': <what>".
  [[noreturn]] void reject(const std::string& what) const;

 private:
  std::string name_;
  int descriptor_ = -1;
  int64_t size_bytes_ = 0;
};

/// A file to be written. The constructor finds out whether it can be, before any work is done;
/// write() fills a temporary beside it and renames that, so that no partial file is ever seen.
class OutputFile {
 public:
  OutputFile(std::string argument, std::string path);
  void write(std::span<const std::string_view> parts) const;
  void write(std::string_view text) const { write(std::span(&text, 1)); }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  [[noreturn]] void reject(int error) const;
  std::string argument_;
  std::string path_;
  bool in_place_ = false;  ///< a pipe or a device: renaming over it would replace it
};

/// Creates a directory and its parents; `argument` names it in the failure.
void make_directories(const std::string& argument, const std::string& path);

}  // namespace attn8::app
