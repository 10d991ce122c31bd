// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

#include "failure.hpp"

namespace attn8::app {
namespace {

std::optional<int64_t> number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

std::vector<std::string_view> words_of(std::string_view name) {
  std::vector<std::string_view> words;
  while (true) {
    const size_t dot = name.find('.');
    words.push_back(name.substr(0, dot));
    if (dot == std::string_view::npos) return words;
    name.remove_prefix(dot + 1);
  }
}

HostTensor run_mode(const RealEntry& entry, Mode mode, const Context& context) {
  AttentionOptions options;
  options.mode = mode;
  options.softmax_scale = entry.softmax_scale;
  options.mask = entry.mask;
  HostTensor out(DType::kFloat32, entry.qkv.q.shape());
  require(attention(entry.qkv.inputs(), {out.view()}, options, context));
  return out;
}

}  // namespace

EntryName parse_entry_name(const std::string& argument, const std::string& name) {
  const std::vector<std::string_view> words = words_of(name);
  EntryName result;
  std::optional<int64_t> layer;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "layer" && i + 1 < words.size()) {
      layer = number(words[++i]);
    } else if (layer && words[i].starts_with("kv")) {
      result.first_kv_head = number(words[i].substr(2)).value_or(0);
    } else if (!layer) {
      result.model += (result.model.empty() ? "" : ".") + std::string(words[i]);
    }
  }
  if (!layer) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("{}: entry '{}' wants a name like MODEL.layer.05.kv1 or layer.05", argument,
                     name));
  }
  result.layer = *layer;
  return result;
}

void measure_entry(const EntryName& name, const RealEntry& entry, const Context& context,
                   std::vector<HeadError>& heads) {
  const HostTensor exact = run_mode(entry, Mode::kExact, context);
  const HostTensor accurate = run_mode(entry, Mode::kAccurate, context);
  const HostTensor half = run_mode(entry, Mode::kHalf, context);
  const int64_t nheads_k = entry.qkv.k.shape()[2];
  const int64_t group = entry.qkv.q.shape()[2] / nheads_k;
  for (int64_t kv_head = 0; kv_head < nheads_k; ++kv_head) {
    HeadError one;
    one.layer = name.layer;
    one.kv_head = name.first_kv_head + kv_head;
    for (int64_t batch = 0; batch < exact.shape()[0]; ++batch) {
      const auto values = [&](const HostTensor& x) {
        return gather_rows(slice_heads(x.view(), batch, kv_head * group, group), {});
      };
      const std::vector<double> want = values(exact);
      const std::vector<double> got = values(accurate);
      const std::vector<double> got_half = values(half);
      for (size_t i = 0; i < want.size(); ++i) {
        one.reference += want[i] * want[i];
        one.accurate += (got[i] - want[i]) * (got[i] - want[i]);
        one.half += (got_half[i] - want[i]) * (got_half[i] - want[i]);
      }
    }
    const auto before = [](const HeadError& a, const HeadError& b) {
      return std::pair(a.layer, a.kv_head) < std::pair(b.layer, b.kv_head);
    };
    const auto place = std::lower_bound(heads.begin(), heads.end(), one, before);
    if (place == heads.end() || before(one, *place)) {
      heads.insert(place, one);
      continue;
    }
    place->reference += one.reference;
    place->accurate += one.accurate;
    place->half += one.half;
  }
}

double total_error(const std::vector<HeadError>& heads) {
  double error = 0;
  double reference = 0;
  for (const HeadError& head : heads) {
    error += head.error(head.mode);
    reference += head.reference;
  }
  return error == 0 ? 0 : std::sqrt(error / reference);
}

void spend_budget(double budget, std::vector<HeadError>& heads) {
  while (total_error(heads) > budget) {
    const auto worst = std::max_element(
        heads.begin(), heads.end(),
        [](const HeadError& a, const HeadError& b) { return a.error(a.mode) < b.error(b.mode); });
    const bool half_helps = worst->mode == Mode::kAccurate && worst->half < worst->accurate;
    worst->mode = half_helps ? Mode::kHalf : Mode::kExact;
  }
}

}  // namespace attn8::app
