// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "machine.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <fstream>

#include "parallel.hpp"

namespace attn8::app {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

}  // namespace

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

nlohmann::ordered_json machine_json() {
  nlohmann::ordered_json caches = nlohmann::ordered_json::object();
  for (int index = 0; index < 8; ++index) {
    const std::string base = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", index);
    const std::string level = first_line(base + "level");
    const std::string type = first_line(base + "type");
    const std::string size = first_line(base + "size");
    if (level.empty() || size.empty()) break;
    const std::string suffix = type == "Data" ? "d" : type == "Instruction" ? "i" : "";
    caches["L" + level + suffix] = size;
  }
  return {
    {"cpu", cpu_name()}, {"cores", core_count()}, {"caches", caches},
#if defined(__clang__)
        {"compiler", fmt::format("clang {}.{}", __clang_major__, __clang_minor__)},
#else
        {"compiler", fmt::format("gcc {}.{}", __GNUC__, __GNUC_MINOR__)},
#endif
        {"omp_proc_bind", setting("OMP_PROC_BIND")}, {
      "omp_wait_policy", setting("OMP_WAIT_POLICY")
    }
  };
}

}  // namespace attn8::app
