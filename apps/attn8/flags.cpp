// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "flags.hpp"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "failure.hpp"
#include "parallel.hpp"

namespace attn8::app {
namespace {

std::optional<int64_t> to_integer(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// N of "cuda:N".
std::optional<int64_t> cuda_index(std::string_view device) {
  constexpr std::string_view kPrefix = "cuda:";
  if (!device.starts_with(kPrefix)) return std::nullopt;
  const auto index = to_integer(device.substr(kPrefix.size()));
  if (!index || *index < 0 || *index > INT16_MAX) return std::nullopt;
  return index;
}

}  // namespace

CLI::Validator whole_number(int64_t low, int64_t high) {
  return {[low, high](std::string& text) -> std::string {
            const auto value = to_integer(text);
            if (value && *value >= low && *value <= high) return {};
            return fmt::format("got '{}', want a whole number from {} to {}", text, low, high);
          },
          ""};
}

CLI::Validator finite_number() {
  return {[](std::string& text) -> std::string {
            float value = 0;
            const auto [end, error] =
                std::from_chars(text.data(), text.data() + text.size(), value);
            if (error == std::errc() && end == text.data() + text.size() && std::isfinite(value)) {
              return {};
            }
            return fmt::format("got '{}', want a finite number", text);
          },
          ""};
}

void ContextFlags::add(CLI::App& command) {
  command.add_option("--threads", threads, "Threads; the default is every core")
      ->check(whole_number(1, 4096))
      ->type_name("N");
  add_place(command);
}

void ContextFlags::add_place(CLI::App& command) {
  command
      .add_option("--isa", isa, "Insist on an instruction set: scalar, avx2, avx_vnni, avx512_vnni")
      ->type_name("NAME");
  command.add_option("--device", device, "cpu, cuda or cuda:N")
      ->type_name("NAME")
      ->capture_default_str();
}

Context ContextFlags::context() const {
  if (device.starts_with("cuda")) {
    const auto index = device == "cuda" ? 0 : cuda_index(device);
    if (!index) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("--device: got '{}', want cpu, cuda or cuda:N", device));
    }
    if (!isa.empty()) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("--isa: got '{}' beside --device {}, want it with cpu only", isa, device));
    }
    Context context = Context::cuda(static_cast<int32_t>(*index));
    context.threads = threads > 0 ? threads : core_count();  // of the oracles
    return context;
  }
  if (device != "cpu") {
    fail(StatusCode::kInvalidArgument,
         fmt::format("--device: got '{}', want cpu, cuda or cuda:N", device));
  }
  Context context = Context::cpu(threads > 0 ? threads : core_count());
  if (!isa.empty()) {
    context.force_isa = true;
    context.isa = take(parse_isa(isa));
  }
  return context;
}

void OptionFlags::add(CLI::App& command) {
  command.add_option("--scale", scale, "Softmax scale; the default is 1/sqrt(head_dim)")
      ->check(finite_number())
      ->type_name("X");
  command.add_flag("--causal", causal, "Query i sees keys up to its diagonal");
  command
      .add_option(
          "--align", align,
          "Diagonal of --causal and --window: bottom_right (flash-attn) or top_left (torch)")
      ->check(CLI::IsMember({"bottom_right", "top_left"}))
      ->type_name("NAME")
      ->capture_default_str();
  command
      .add_option("--window", window,
                  "Sliding window: L keys before and R keys after the diagonal, -1 for no limit")
      ->type_name("L,R");
  command.add_option("--softcap", softcap, "Scores s become X * tanh(s / X)")
      ->check(finite_number())
      ->type_name("X");
  command
      .add_option("--v-granularity", v_granularity,
                  "Scales of V in accurate: token, tensor, channel, block, block_channel")
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--kv-block", kv_block, "Keys per block of the online softmax")
      ->check(whole_number(1))
      ->type_name("N");
  command.add_flag("--no-smooth-k", no_smooth_k, "Do not subtract the mean of K (accurate, half)");
  command.add_option("--fp8-format", fp8_format, "e4m3 (one scale per tensor) or e5m2 (raw)")
      ->check(CLI::IsMember({"e4m3", "e5m2"}))
      ->type_name("NAME")
      ->capture_default_str();
}

AttentionOptions OptionFlags::options(Mode chosen) const {
  AttentionOptions options;
  options.mode = chosen;
  options.softmax_scale = scale;
  options.mask.causal = causal;
  options.mask.align = align == "top_left" ? CausalAlign::kTopLeft : CausalAlign::kBottomRight;
  if (!window.empty()) {
    const auto sides = parse_integers("--window", window, 2, "L,R: two whole numbers >= -1");
    if (sides[0] < -1 || sides[1] < -1) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("--window: got '{}', want L,R: two whole numbers >= -1", window));
    }
    options.mask.window_left = sides[0];
    options.mask.window_right = sides[1];
  }
  options.softcap = softcap;
  options.kv_block = kv_block;
  options.v_granularity = take(parse_granularity(v_granularity));
  options.smooth_k = !no_smooth_k;
  options.fp8_format = fp8_format == "e5m2" ? Fp8Format::kE5m2Raw : Fp8Format::kE4m3Tensor;
  return options;
}

DType parse_float_dtype(const std::string& argument, const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == to_string(dtype)) return dtype;
  }
  fail(StatusCode::kInvalidArgument,
       fmt::format("{}: got '{}', want float32, float16 or bfloat16", argument, name));
}

Layout parse_layout(const std::string& name) {
  if (name == "bshd") return Layout::kBshd;
  if (name == "bhsd") return Layout::kBhsd;
  fail(StatusCode::kInvalidArgument, fmt::format("--layout: got '{}', want bshd or bhsd", name));
}

std::vector<int64_t> parse_integers(const std::string& argument, const std::string& text,
                                    size_t count, const std::string& want) {
  std::vector<int64_t> values;
  std::string_view rest = text;
  while (true) {
    const size_t comma = rest.find(',');
    const auto value = to_integer(rest.substr(0, comma));
    if (!value) break;
    values.push_back(*value);
    if (comma == std::string_view::npos) {
      if (values.size() == count) return values;
      break;
    }
    rest.remove_prefix(comma + 1);
  }
  fail(StatusCode::kInvalidArgument, fmt::format("{}: got '{}', want {}", argument, text, want));
}

}  // namespace attn8::app
