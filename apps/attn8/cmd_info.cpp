// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attn8/context.hpp"
#include "attn8/cuda.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "machine.hpp"
#include "verify.hpp"

namespace attn8::app {
namespace {

/// One small causal problem per mode on every ISA; the first failure, or nothing.
std::string self_test(const std::vector<Isa>& isas) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact}) {
    VerifyCase one;
    one.shape = {1, 4, 2, 33, 129, 64};
    one.options.mode = mode;
    one.options.mask.causal = true;
    const auto outcomes = verify_case(one, isas);
    for (size_t i = 0; i < isas.size(); ++i) {
      if (!outcomes[i].failure.empty()) {
        return fmt::format("{} {}: {}", to_string(isas[i]), to_string(mode), outcomes[i].failure);
      }
    }
  }
  return {};
}

nlohmann::ordered_json cuda_json(const CudaSupport& cuda) {
  nlohmann::ordered_json report = {{"built", cuda.built},
                                   {"reason", cuda.reason},
                                   {"devices", nlohmann::ordered_json::array()},
                                   {"kernel_images", cuda.kernel_images}};
  for (const CudaDevice& device : cuda.devices) {
    report["devices"].push_back({{"index", device.index},
                                 {"name", device.name},
                                 {"compute_capability", {device.major, device.minor}},
                                 {"multiprocessors", device.multiprocessors},
                                 {"kernels", device.kernels},
                                 {"reason", device.reason}});
  }
  return report;
}

void print_cuda(const CudaSupport& cuda) {
  if (!cuda.built) {
    fmt::print("{:<10} not in this build\n", "cuda");
    return;
  }
  if (cuda.devices.empty()) {
    fmt::print("{:<10} {} kernels in this build, no device: {}\n", "cuda",
               cuda.kernel_images.size(), cuda.reason);
  }
  for (const CudaDevice& device : cuda.devices) {
    fmt::print("{:<10} {:<12} {}\n", "cuda", fmt::format("cuda:{}", device.index),
               device.kernels.empty()
                   ? fmt::format("no: {}", device.reason)
                   : fmt::format("{}, compute capability {}.{}, {} multiprocessors, {} kernels",
                                 device.name, device.major, device.minor, device.multiprocessors,
                                 device.kernels));
  }
}

void run(bool json) {
  const CudaSupport cuda = cuda_support();
  const std::vector<Isa> isas = available_isas();
  const std::string failure = self_test(isas);
  nlohmann::ordered_json report = {{"version", version()},
                                   {"isa", to_string(best_isa())},
                                   {"isas", nlohmann::ordered_json::array()},
                                   {"machine", machine_json()},
                                   {"cuda", cuda_json(cuda)},
                                   {"self_test", failure.empty() ? "ok" : failure}};
  for (const IsaSupport& support : isa_support()) {
    report["isas"].push_back({{"name", to_string(support.isa)},
                              {"available", support.available},
                              {"reason", support.reason}});
  }
  if (json) {
    fmt::print("{}\n", report.dump());
  } else {
    const auto& machine = report["machine"];
    fmt::print("attn8 {}\n", version());
    fmt::print("{:<10} {}, {} cores\n", "cpu", machine["cpu"].get<std::string>(),
               machine["cores"].get<int>());
    std::string caches;
    for (const auto& [name, size] : machine["caches"].items()) {
      caches += fmt::format("{}{} {}", caches.empty() ? "" : ", ", name, size.get<std::string>());
    }
    fmt::print("{:<10} {}\n", "caches", caches.empty() ? "unknown" : caches);
    for (const IsaSupport& support : isa_support()) {
      fmt::print("{:<10} {:<12} {}\n", "isa", to_string(support.isa),
                 !support.available          ? fmt::format("no: {}", support.reason)
                 : support.isa == best_isa() ? "chosen"
                                             : "available");
    }
    print_cuda(cuda);
    fmt::print(
        "{:<10} {}\n", "self-test",
        failure.empty() ? "ok: every mode on every available isa equals its oracle" : failure);
  }
  if (!failure.empty()) fail(StatusCode::kInternal, "self-test failed: " + failure);
}

}  // namespace

void add_info(CLI::App& root) {
  auto json = std::make_shared<bool>(false);
  CLI::App& command =
      *root.add_subcommand("info", "Version, instruction sets, machine, and a self-test");
  command.add_flag("--json", *json, "One JSON object on stdout");
  command.final_callback([json] { run(*json); });
}

}  // namespace attn8::app
