// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "policy.hpp"

#include <fmt/format.h>

#include <optional>
#include <span>

#include "file.hpp"

namespace attn8::app {
namespace {

constexpr std::string_view kFormat = "attn8-head-policy";
constexpr int64_t kVersion = 1;
constexpr int64_t kMaxIndex = 1 << 20;  // of layers and heads; no model comes near it

/// A whole number in [0, kMaxIndex] at `key`.
std::optional<int64_t> index_at(const nlohmann::json& json, const char* key) {
  const auto place = json.find(key);
  if (place == json.end() || !place->is_number_unsigned()) return std::nullopt;
  const auto value = place->get<uint64_t>();
  if (value > static_cast<uint64_t>(kMaxIndex)) return std::nullopt;
  return static_cast<int64_t>(value);
}

std::optional<Mode> mode_at(const nlohmann::json& json, const char* key) {
  const auto place = json.find(key);
  if (place == json.end() || !place->is_string()) return std::nullopt;
  const Result<Mode> mode = parse_mode(place->get<std::string>());
  if (!mode.ok()) return std::nullopt;
  return mode.value();
}

}  // namespace

Mode HeadPolicy::mode(int64_t layer, int64_t kv_head) const {
  const auto place = heads.find({layer, kv_head});
  return place == heads.end() ? Mode::kAccurate : place->second;
}

std::vector<Mode> HeadPolicy::modes(int64_t layer, int64_t nheads_k) const {
  std::vector<Mode> result;
  bool named = false;
  for (int64_t head = 0; head < nheads_k; ++head) {
    result.push_back(mode(layer, head));
    named = named || result.back() != Mode::kAccurate;
  }
  if (!named) result.clear();
  return result;
}

nlohmann::ordered_json HeadPolicy::json() const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const auto& [head, head_mode] : heads) {
    list.push_back(
        {{"layer", head.first}, {"kv_head", head.second}, {"mode", to_string(head_mode)}});
  }
  return {{"format", kFormat},
          {"version", kVersion},
          {"model", model},
          {"default", to_string(Mode::kAccurate)},
          {"heads", list}};
}

HeadPolicy read_policy(const std::string& argument, const std::string& path) {
  const InputFile file(argument, path);
  constexpr int64_t kMaxBytes = 1 << 26;
  if (file.size_bytes() > kMaxBytes) {
    file.reject(fmt::format("has {} bytes, want at most {}", file.size_bytes(), kMaxBytes));
  }
  std::string text(static_cast<size_t>(file.size_bytes()), ' ');
  file.read(0, std::as_writable_bytes(std::span(text)));
  const auto json = nlohmann::json::parse(text, nullptr, false);
  const bool known = json.is_object() && json.value("format", nlohmann::json()) == kFormat &&
                     json.value("version", nlohmann::json()) == kVersion &&
                     mode_at(json, "default") == Mode::kAccurate && json.contains("heads") &&
                     json["heads"].is_array();
  if (!known) {
    file.reject(fmt::format(
        "is not a policy, want JSON with format '{}', version {}, default 'accurate' and heads",
        kFormat, kVersion));
  }
  HeadPolicy policy;
  if (json.contains("model") && json["model"].is_string()) policy.model = json["model"];
  for (size_t i = 0; i < json["heads"].size(); ++i) {
    const auto& entry = json["heads"][i];
    const bool object = entry.is_object();
    const auto layer = object ? index_at(entry, "layer") : std::nullopt;
    const auto kv_head = object ? index_at(entry, "kv_head") : std::nullopt;
    const auto mode = object ? mode_at(entry, "mode") : std::nullopt;
    if (!layer || !kv_head || !mode ||
        (mode != Mode::kAccurate && mode != Mode::kHalf && mode != Mode::kExact)) {
      file.reject(
          fmt::format("heads[{}] wants a layer and a kv_head from 0 to {} and a mode of "
                      "accurate, half, exact",
                      i, kMaxIndex));
    }
    if (!policy.heads.emplace(std::pair(*layer, *kv_head), *mode).second) {
      file.reject(fmt::format("heads[{}] names layer {}, kv_head {} again", i, *layer, *kv_head));
    }
  }
  return policy;
}

}  // namespace attn8::app
