// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "failure.hpp"

namespace attn8::app {
namespace {

/// An empty file beside `path`, open for writing, with the permissions a new file gets.
int open_temporary(const std::string& path, std::string& temporary) {
  temporary = path + ".XXXXXX";
  const int descriptor = mkstemp(temporary.data());
  if (descriptor >= 0) {
    const mode_t mask = umask(0);
    umask(mask);
    static_cast<void>(fchmod(descriptor, 0666 & ~mask));
  }
  return descriptor;
}

bool write_all(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

}  // namespace

InputFile::InputFile(std::string argument, std::string path)
    : name_(fmt::format("{}: '{}'", argument, path)) {
  struct stat status = {};
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0 || fstat(descriptor_, &status) != 0) {
    const int error = errno;
    if (descriptor_ >= 0) close(descriptor_);
    reject(fmt::format("cannot be read ({}), want a readable file", std::strerror(error)));
  }
  if (!S_ISREG(status.st_mode)) {
    close(descriptor_);
    reject("is not a regular file, want one");
  }
  size_bytes_ = status.st_size;
}

InputFile::InputFile(InputFile&& other) noexcept
    : name_(std::move(other.name_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_bytes_(other.size_bytes_) {}

InputFile::~InputFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

void InputFile::read(int64_t offset, std::span<std::byte> into) const {
  while (!into.empty()) {
    const ssize_t got = pread(descriptor_, into.data(), into.size(), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) reject(fmt::format("cannot be read ({})", std::strerror(errno)));
    if (got == 0) {
      reject(fmt::format("is truncated: ends at byte {}, want {} more", offset, into.size()));
    }
    offset += got;
    into = into.subspan(static_cast<size_t>(got));
  }
}

void InputFile::reject(const std::string& what) const {
  fail(StatusCode::kInvalidArgument, fmt::format("{}: {}", name_, what));
}

OutputFile::OutputFile(std::string argument, std::string path)
    : argument_(std::move(argument)), path_(std::move(path)) {
  if (path_.empty()) reject(ENOENT);
  struct stat status = {};
  if (stat(path_.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) reject(EISDIR);
    if (access(path_.c_str(), W_OK) != 0) reject(errno);
    in_place_ = !S_ISREG(status.st_mode);
    // Behind a symbolic link it is the file that is replaced, not the link.
    std::error_code error;
    const auto target = std::filesystem::canonical(path_, error);
    if (!error) path_ = target.string();
  }
  if (in_place_) return;
  std::string temporary;
  const int descriptor = open_temporary(path_, temporary);
  if (descriptor < 0) reject(errno);
  close(descriptor);
  unlink(temporary.c_str());
}

void OutputFile::write(std::span<const std::string_view> parts) const {
  std::string temporary = path_;
  const int descriptor =
      in_place_ ? open(path_.c_str(), O_WRONLY | O_CLOEXEC) : open_temporary(path_, temporary);
  if (descriptor < 0) reject(errno);
  bool good = true;
  for (const std::string_view part : parts) good = good && write_all(descriptor, part);
  int error = good ? 0 : errno;
  if (close(descriptor) != 0 && error == 0) error = errno;
  if (!in_place_ && error == 0 && rename(temporary.c_str(), path_.c_str()) != 0) error = errno;
  if (error != 0) {
    if (!in_place_) unlink(temporary.c_str());
    reject(error);
  }
}

void OutputFile::reject(int error) const {
  fail(StatusCode::kInvalidArgument,
       fmt::format("{}: '{}': cannot be written ({}), want a writable path", argument_, path_,
                   std::strerror(error)));
}

void make_directories(const std::string& argument, const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("{}: '{}': cannot be created ({}), want a writable directory", argument, path,
                     error.message()));
  }
}

}  // namespace attn8::app
