// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "attn8/attention.hpp"
#include "attn8/reference.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "flags.hpp"
#include "measure.hpp"
#include "npy.hpp"
#include "policy.hpp"
#include "safetensors.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

struct RunFlags {
  std::string q, k, v, qkv, entry, out, lse;
  std::string policy;
  int64_t layer = 0;
  std::string mode = "accurate";
  std::string layout = "bshd";
  OptionFlags options;
  ContextFlags context;
  std::string alibi, bias, sinks;
  bool allow_nonfinite = false;
  bool check = false;
  int64_t rows = 64;
  bool json = false;
};

Qkv read_qkv(const RunFlags& flags, Layout layout) {
  if (!flags.qkv.empty()) {
    const SafetensorsFile file("--qkv", flags.qkv);
    return {file.read(flags.entry + "q", layout), file.read(flags.entry + "k", layout),
            file.read(flags.entry + "v", layout)};
  }
  return {read_npy_tensor("--q", flags.q, layout), read_npy_tensor("--k", flags.k, layout),
          read_npy_tensor("--v", flags.v, layout)};
}

Qkv read_operands(const RunFlags& flags, Layout layout) {
  Qkv qkv = read_qkv(flags, layout);
  if (!flags.bias.empty()) qkv.attn_mask = read_npy_mask("--bias", flags.bias);
  if (!flags.alibi.empty()) qkv.alibi_slopes = read_npy_heads("--alibi", flags.alibi);
  if (!flags.sinks.empty()) qkv.sinks = read_npy_heads("--sinks", flags.sinks);
  return qkv;
}

void require_operand_flags(const RunFlags& flags) {
  const bool separate = !flags.q.empty() || !flags.k.empty() || !flags.v.empty();
  if (!flags.qkv.empty() && separate) {
    fail(StatusCode::kInvalidArgument,
         "--qkv: got --q, --k or --v beside it, want one or the other");
  }
  if (!flags.qkv.empty()) return;
  for (const auto& [name, path] :
       {std::pair{"--q", &flags.q}, {"--k", &flags.k}, {"--v", &flags.v}}) {
    if (path->empty()) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("{}: got nothing, want a .npy file (or --qkv FILE.safetensors)", name));
    }
  }
}

/// What AttentionOptions::check_finite does where the library sees the data.
void require_finite(const char* name, const HostTensor& x) {
  const Extents& shape = x.shape();
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t s = 0; s < shape[1]; ++s) {
      for (int64_t h = 0; h < shape[2]; ++h) {
        for (int64_t d = 0; d < shape[3]; ++d) {
          const double value = load_float(element_address(x.view(), b, s, h, d), x.dtype());
          if (std::isfinite(value)) continue;
          fail(StatusCode::kInvalidArgument,
               fmt::format("{}[{}, {}, {}, {}] got {}, wants finite numbers", name, b, s, h, d,
                           value));
        }
      }
    }
  }
}

/// What the policy says of the layer; empty without one.
std::vector<Mode> read_head_modes(const RunFlags& flags, int64_t nheads_k) {
  if (flags.policy.empty()) return {};
  if (flags.mode != to_string(Mode::kAccurate)) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("--policy: got --mode {} beside it, want accurate", flags.mode));
  }
  return read_policy("--policy", flags.policy).modes(flags.layer, nheads_k);
}

void run(const RunFlags& flags) {
  require_operand_flags(flags);
  const Layout layout = parse_layout(flags.layout);
  AttentionOptions options = flags.options.options(take(parse_mode(flags.mode)));
  const Context context = flags.context.context();
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  options.check_finite = on_cpu && !flags.allow_nonfinite;
  const OutputFile out_file("--out", flags.out);
  std::optional<OutputFile> lse_file;
  if (!flags.lse.empty()) {
    lse_file.emplace("--lse", flags.lse);
    if (lse_file->path() == out_file.path()) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("--lse: got '{}', want another file than --out", flags.lse));
    }
  }

  const Qkv qkv = read_operands(flags, layout);
  const std::vector<Mode> head_modes = read_head_modes(flags, qkv.k.shape()[2]);
  options.head_modes = head_modes;
  if (!on_cpu && !flags.allow_nonfinite) {
    require_finite("q", qkv.q);
    require_finite("k", qkv.k);
    require_finite("v", qkv.v);
  }
  // .npy has no bfloat16.
  const DType out_dtype = qkv.q.dtype() == DType::kFloat16 ? DType::kFloat16 : DType::kFloat32;
  Runner runner(qkv, options, context, lse_file.has_value(), layout, out_dtype);
  const RunTimes times = runner.run();

  const AttentionPlan& plan = runner.plan();
  nlohmann::ordered_json report = {{"mode", to_string(options.mode)},
                                   {"kernel", plan.kernel()},
                                   {"isa", on_cpu ? to_string(plan.isa()) : "cuda"},
                                   {"threads", context.threads},
                                   {"kv_block", plan.kv_block()},
                                   {"v_granularity", to_string(plan.v_granularity())},
                                   {"shape", qkv.shape().list()},
                                   {"quantize_ms", times.quantize_ms},
                                   {"attention_ms", times.attention_ms}};
  if (!head_modes.empty()) {
    for (const Mode mode : head_modes) report["head_modes"].push_back(to_string(mode));
  }
  if (flags.check) {
    const Sample sample = Sample::spread(qkv.shape(), flags.rows, INT64_MAX);
    const auto exact = exact_rows(qkv, options, sample, context.threads);
    const auto error = reference::error_report(gather(runner.out().view(), sample), exact);
    report["rel_l2"] = error.rel_l2;
    report["mean_rel"] = error.mean_rel;
    report["max_abs"] = error.max_abs;
    report["cosine"] = error.cosine;
    report["mre"] = error.mre;
    report["rows_checked"] = sample.rows.size();
  }
  write_npy(out_file, runner.out().view(), layout);
  if (lse_file) write_npy(*lse_file, runner.lse().view(), layout, 3);

  if (flags.json) {
    fmt::print("{}\n", report.dump());
    return;
  }
  for (const auto& [key, value] : report.items()) {
    fmt::print("{:<14} {}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
  }
}

}  // namespace

void add_run(CLI::App& root) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App& command = *root.add_subcommand("run", "Attention of tensors in files");
  command.add_option("--q", flags->q, "Queries, .npy, float32 or float16, four axes")
      ->type_name("FILE");
  command.add_option("--k", flags->k, "Keys, as --q")->type_name("FILE");
  command.add_option("--v", flags->v, "Values, as --q")->type_name("FILE");
  command.add_option("--qkv", flags->qkv, "A safetensors file with all three instead")
      ->type_name("FILE");
  command
      .add_option("--entry", flags->entry,
                  "Prefix of the tensor names in --qkv, for example layer.03.")
      ->type_name("NAME");
  command.add_option("--out", flags->out, "Output, .npy in the axis order of the inputs")
      ->type_name("FILE")
      ->required();
  command.add_option("--lse", flags->lse, "Logarithm of the softmax denominator, .npy, three axes")
      ->type_name("FILE");
  command.add_option("--mode", flags->mode, "accurate, paper, half, exact or fp8")
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--layout", flags->layout, "Axis order of the files: bshd or bhsd")
      ->type_name("NAME")
      ->capture_default_str();
  command
      .add_option("--policy", flags->policy, "Modes of the heads, as attn8 calibrate writes them")
      ->type_name("FILE");
  command.add_option("--layer", flags->layer, "The layer of --policy that the tensors are of")
      ->check(whole_number(0))
      ->type_name("N")
      ->capture_default_str();
  flags->options.add(command);
  flags->context.add(command);
  command.add_flag("--allow-nonfinite", flags->allow_nonfinite,
                   "Let NaN and Inf through to the rows that see them instead of refusing them");
  command.add_flag("--check", flags->check, "Add the error against float64 attention");
  command.add_option("--rows", flags->rows, "Query rows per head that --check compares")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command
      .add_option("--bias", flags->bias,
                  "Added to the scores, or of bool and false where a key is hidden; .npy, "
                  "[batch, head, seqlen_q, seqlen_k], each of them or 1")
      ->type_name("FILE");
  command.add_option("--alibi", flags->alibi, "ALiBi slopes, .npy, [head] or [batch, head]")
      ->type_name("FILE");
  command.add_option("--sinks", flags->sinks, "Attention sinks, a score per head, .npy, [head]")
      ->type_name("FILE");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
