// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "real_tensors.hpp"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#ifndef ATTN8_SOURCE_DIR
#define ATTN8_SOURCE_DIR "."
#endif

namespace attn8::app {

RealTensors::RealTensors(const std::string& argument, const std::string& path)
    : file_(argument, path), prefixes_(file_.qkv_prefixes()) {
  if (prefixes_.empty()) file_.file().reject("holds no tensors NAME.q, NAME.k, NAME.v");
}

std::string RealTensors::name(size_t i) const {
  const std::string& prefix = prefixes_[i];
  return prefix.empty() ? "qkv" : prefix.substr(0, prefix.size() - 1);
}

RealEntry RealTensors::read(size_t i) const {
  const std::string& prefix = prefixes_[i];
  RealEntry entry;
  entry.name = name(i);
  const Layout layout = file_.find_metadata(prefix, "layout").value_or("bshd") == "bhsd"
                            ? Layout::kBhsd
                            : Layout::kBshd;
  entry.qkv = {file_.read(prefix + "q", layout), file_.read(prefix + "k", layout),
               file_.read(prefix + "v", layout)};
  if (const auto text = file_.find_metadata(prefix, "softmax_scale")) {
    float scale = 0;
    const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), scale);
    if (error != std::errc() || end != text->data() + text->size() || !std::isfinite(scale)) {
      file_.file().reject(
          fmt::format("metadata '{}softmax_scale' is '{}', want a finite number", prefix, *text));
    }
    entry.softmax_scale = scale;
  }
  const std::string causal = file_.find_metadata(prefix, "causal").value_or("false");
  if (causal != "true" && causal != "false") {
    file_.file().reject(
        fmt::format("metadata '{}causal' is '{}', want true or false", prefix, causal));
  }
  entry.mask.causal = causal == "true";
  const std::string align = file_.find_metadata(prefix, "causal_align").value_or("bottom_right");
  entry.mask.align = align == "top_left" ? CausalAlign::kTopLeft : CausalAlign::kBottomRight;
  entry.source = file_.find_metadata(prefix, "source").value_or("");

  const Extents& q = entry.qkv.q.shape();
  const Extents& k = entry.qkv.k.shape();
  if (k != entry.qkv.v.shape() || q[0] != k[0] || q[3] != k[3] || k[2] < 1 || q[2] % k[2] != 0 ||
      q[1] < 1 || k[1] < 1) {
    file_.file().reject(fmt::format(
        "'{}': q [{}, {}, {}, {}] and k [{}, {}, {}, {}] (and v like k) do not fit together",
        prefix, q[0], q[1], q[2], q[3], k[0], k[1], k[2], k[3]));
  }
  return entry;
}

std::string default_sample_path() { return ATTN8_SOURCE_DIR "/data/real_sample.safetensors"; }

std::string committed_study_path() { return ATTN8_SOURCE_DIR "/docs/results/study.json"; }

std::string committed_peers_path() { return ATTN8_SOURCE_DIR "/docs/results/peers_cpu.json"; }

}  // namespace attn8::app
