// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr Mode kModes[] = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact, Mode::kFp8};
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

/// Workspace of a given size, 64-byte aligned, with a guard behind it.
class Memory64 {
 public:
  explicit Memory64(size_t bytes) : bytes_(bytes), data_(bytes + 128, std::byte{0xff}) {}
  [[nodiscard]] std::span<std::byte> span() {
    return {data_.data() + (64 - reinterpret_cast<uintptr_t>(data_.data()) % 64) % 64, bytes_};
  }
  /// The 64 bytes behind the workspace are as they were.
  [[nodiscard]] bool guard_intact() {
    const std::byte* end = span().data() + bytes_;
    for (const std::byte* p = end; p < data_.data() + data_.size(); ++p) {
      if (*p != std::byte{0xff}) return false;
    }
    return true;
  }

 private:
  size_t bytes_;
  std::vector<std::byte> data_;
};

KernelCase small_case(Mode mode) {
  KernelCase c;
  c.options.mode = mode;
  c.options.mask.causal = true;
  c.batch = 2;
  c.nheads_q = 4;
  c.nheads_k = 2;
  c.seqlen_q = 13;
  c.seqlen_k = 70;
  c.head_dim = 24;
  return c;
}

struct Outputs {
  explicit Outputs(const KernelCase& c, Memory memory = Memory::kBshd)
      : out(DType::kFloat32, {c.batch, c.seqlen_q, c.nheads_q, c.head_dim}, memory),
        lse(DType::kFloat32, {c.batch, c.seqlen_q, c.nheads_q, 1}, memory) {}
  AttentionOutputs views() { return {out.view(), lse.view()}; }
  Tensor out, lse;
};

Outputs attend(const KernelCase& c, const AttentionInputs& inputs) {
  Outputs outputs(c);
  const Status status = attention(inputs, outputs.views(), c.options, {});
  EXPECT_TRUE(status.ok()) << status.message();
  return outputs;
}

AttentionPlan plan_for(const KernelCase& c, const AttentionInputs& inputs, Outputs& outputs,
                       const Context& context = {}) {
  Result<AttentionPlan> plan = AttentionPlan::make(inputs, outputs.views(), c.options, context);
  if (!plan.ok()) ADD_FAILURE() << plan.status().message();
  return plan.value();
}

TEST(Plan, SaysWhatItRuns) {
  for (const IsaSupport& support : isa_support()) {
    if (!support.available) continue;
    for (const Mode mode : kModes) {
      const KernelCase c = small_case(mode);
      const KernelInputs inputs = make_inputs(c);
      Outputs outputs(c);
      const AttentionPlan plan =
          plan_for(c, inputs.operands(), outputs, Context::with_isa(support.isa));
      if (mode == Mode::kFp8) {
        EXPECT_EQ(plan.kernel(), "emulation_fp8");
        continue;
      }
      EXPECT_EQ(plan.kernel(), "attend_" + std::string(to_string(mode)) + "_" +
                                   std::string(to_string(support.isa)) + "_d24");
      EXPECT_EQ(plan.isa(), support.isa);
    }
  }
  KernelCase c = small_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  Outputs outputs(c);
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).isa(), best_isa());
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).kv_block(), kDefaultKvBlock);
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).v_granularity(), Granularity::kToken);
  c.options.kv_block = 320;
  c.options.v_granularity = Granularity::kChannel;
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).kv_block(), 320);
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).v_granularity(), Granularity::kChannel);
  c.options.mode = Mode::kPaper;
  EXPECT_EQ(plan_for(c, inputs.operands(), outputs).v_granularity(), Granularity::kTensor);
}

/// Other data and strides than those the plan was made with.
TEST(Plan, RunsOnOtherDataAndStrides) {
  for (const Mode mode : kModes) {
    KernelCase c = small_case(mode);
    const KernelInputs first = make_inputs(c);
    Outputs planned(c);
    const AttentionPlan plan = plan_for(c, first.operands(), planned);
    Memory64 workspace(plan.workspace_bytes());
    for (const Memory memory :
         {Memory::kBshd, Memory::kBhsd, Memory::kStrided, Memory::kReversed}) {
      c.seed += 10;
      c.memory = Memory::kBshd;
      const KernelInputs dense = make_inputs(c);
      const Outputs wanted = attend(c, dense.operands());
      c.memory = memory;
      const KernelInputs inputs = make_inputs(c);
      Outputs got(c, memory);
      RunTimes times{-1, -1};
      const Status status = plan.run(inputs.operands(), got.views(), workspace.span(), &times);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(got.out.values(), wanted.out.values()) << c.name();
      EXPECT_EQ(got.lse.values(), wanted.lse.values()) << c.name();
      EXPECT_GE(times.quantize_ms, 0);
      EXPECT_GE(times.attention_ms, 0);
      EXPECT_TRUE(workspace.guard_intact()) << c.name();
    }
  }
}

TEST(Plan, RunsFromSeveralThreadsAtOnce) {
  for (const Mode mode : kModes) {
    const KernelCase c = small_case(mode);
    constexpr int kThreads = 4;
    std::vector<KernelInputs> inputs;
    std::vector<Outputs> wanted;
    std::vector<Outputs> got;
    for (int i = 0; i < kThreads; ++i) {
      KernelCase own = c;
      own.seed = 100 + static_cast<uint64_t>(i);
      inputs.push_back(make_inputs(own));
      wanted.push_back(attend(c, inputs.back().operands()));
      got.emplace_back(c);
    }
    const AttentionPlan plan = plan_for(c, inputs[0].operands(), got[0]);
    std::atomic<int> failures = 0;
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        Memory64 workspace(plan.workspace_bytes());
        for (int repeat = 0; repeat < 20; ++repeat) {
          const Status status = plan.run(inputs[i].operands(), got[i].views(), workspace.span());
          if (!status.ok() || got[i].out.bytes() != wanted[i].out.bytes() ||
              got[i].lse.bytes() != wanted[i].lse.bytes()) {
            ++failures;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(failures.load(), 0) << to_string(mode);
  }
}

TEST(Plan, CopiesOutliveTheOriginal) {
  const KernelCase c = small_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  const Outputs wanted = attend(c, inputs.operands());
  Outputs got(c);
  std::optional<AttentionPlan> original = plan_for(c, inputs.operands(), got);
  const AttentionPlan copy = *original;
  const AttentionPlan moved = std::move(*original);
  original.reset();
  EXPECT_EQ(copy.workspace_bytes(), moved.workspace_bytes());
  EXPECT_EQ(copy.kernel(), moved.kernel());
  for (const AttentionPlan* plan : {&copy, &moved}) {
    got = Outputs(c);
    Memory64 workspace(plan->workspace_bytes());
    ASSERT_TRUE(plan->run(inputs.operands(), got.views(), workspace.span()).ok());
    EXPECT_EQ(got.out.bytes(), wanted.out.bytes());
  }
}

TEST(Plan, RefusesAWorkspaceThatDoesNotFit) {
  const KernelCase c = small_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  Outputs outputs(c);
  const AttentionPlan plan = plan_for(c, inputs.operands(), outputs);
  const size_t bytes = plan.workspace_bytes();
  ASSERT_GT(bytes, 64u);
  Memory64 workspace(bytes + 64);
  const auto run = [&](std::span<std::byte> span) {
    return plan.run(inputs.operands(), outputs.views(), span);
  };
  EXPECT_EQ(
      run(workspace.span().first(bytes - 1)).message(),
      "workspace got " + std::to_string(bytes - 1) + " bytes, wants " + std::to_string(bytes));
  EXPECT_EQ(run({}).message(), "workspace got 0 bytes, wants " + std::to_string(bytes));
  for (const size_t offset : {1, 8, 32}) {
    const Status status = run(workspace.span().subspan(offset, bytes));
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "workspace.data() wants an alignment of 64 bytes");
  }
  EXPECT_TRUE(run(workspace.span().first(bytes)).ok());
}

/// What a run is given must be what was planned, in all but strides and data.
TEST(Plan, RefusesAnotherProblem) {
  const KernelCase c = small_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  Outputs outputs(c);
  const AttentionPlan plan = plan_for(c, inputs.operands(), outputs);
  Memory64 workspace(plan.workspace_bytes() * 4);
  const auto refused = [&](const KernelCase& other, AttentionInputs operands, bool with_lse,
                           const std::string& message) {
    Outputs own(other);
    AttentionOutputs views = own.views();
    if (!with_lse) views.lse.reset();
    const Status status = plan.run(operands, views, workspace.span());
    EXPECT_EQ(to_string(status.code()), "InvalidArgument") << message;
    EXPECT_EQ(status.message(), message);
  };
  const std::string shapes = "inputs do not have the shapes the plan was made for";
  const std::string types =
      "operands do not have the dtypes, lengths and outputs the plan was made for";
  for (int64_t KernelCase::*extent :
       {&KernelCase::batch, &KernelCase::seqlen_q, &KernelCase::seqlen_k, &KernelCase::head_dim}) {
    for (const int64_t change : {-1, 1}) {
      KernelCase other = c;
      other.*extent += change;
      const KernelInputs own = make_inputs(other);
      refused(other, own.operands(), true, shapes);
    }
  }
  KernelCase heads = c;
  heads.nheads_k = 4;
  const KernelInputs more_heads = make_inputs(heads);
  refused(heads, more_heads.operands(), true, shapes);
  refused(c, inputs.operands(), false, types);
  KernelCase narrow = c;
  narrow.dtype = DType::kFloat16;
  const KernelInputs halves = make_inputs(narrow);
  refused(c, {halves.q.view(), inputs.k.view(), inputs.v.view()}, true, types);
  refused(c, {inputs.q.view(), halves.k.view(), inputs.v.view()}, true, types);
  refused(c, {inputs.q.view(), inputs.k.view(), halves.v.view()}, true, types);
  Tensor codes(DType::kInt8, inputs.k.shape());
  Tensor scale(DType::kFloat32, scale_shape(inputs.k.shape(), {}));
  ASSERT_TRUE(quantize(inputs.k.view(), {}, codes.view(), scale.view(), {}).ok());
  const QuantizedView quantized_k = {codes.view(), scale.view()};
  refused(c, {inputs.q.view(), quantized_k, inputs.v.view()}, true, types);
  // A plan for V by token does not run on V by channel.
  const AttentionInputs token = {inputs.q.view(), inputs.k.view(), quantized_k};
  const AttentionPlan token_plan = plan_for(c, token, outputs);
  Tensor channels(DType::kFloat32, {2, 1, 2, 24});
  const AttentionInputs channel = {
      inputs.q.view(), inputs.k.view(),
      QuantizedView{codes.view(), channels.view(), {Granularity::kChannel, 0}}};
  EXPECT_EQ(token_plan.run(channel, outputs.views(), workspace.span()).message(),
            "v.spec.granularity is not the one the plan was made for");
  // The plan checks the tensors of each run, not only those it was made with.
  AttentionInputs broken = inputs.operands();
  std::get_if<ConstTensorView>(&broken.k)->data = nullptr;
  refused(c, broken, true, "k.data got nullptr, wants [2, 70, 2, 24]");
}

/// Nothing to compute, or nothing to see.
TEST(Plan, EmptyProblems) {
  for (const Mode mode : kModes) {
    for (int64_t KernelCase::*extent :
         {&KernelCase::batch, &KernelCase::seqlen_q, &KernelCase::seqlen_k}) {
      KernelCase c = small_case(mode);
      c.*extent = 0;
      const KernelInputs inputs = make_inputs(c);
      Outputs outputs(c);
      const AttentionPlan plan = plan_for(c, inputs.operands(), outputs, Context::cpu(3));
      // Buffers of three tiles are all that may be left.
      EXPECT_LT(plan.workspace_bytes(), size_t{3} << 18) << c.name();
      Memory64 workspace(plan.workspace_bytes());
      const Status status = plan.run(inputs.operands(), outputs.views(), workspace.span());
      ASSERT_TRUE(status.ok()) << c.name() << ": " << status.message();
      for (const double x : outputs.out.values()) ASSERT_EQ(x, 0) << c.name();
      for (const double x : outputs.lse.values()) ASSERT_EQ(x, kMinusInf) << c.name();
      EXPECT_EQ(outputs.lse.values().empty(), c.batch * c.seqlen_q == 0);
      EXPECT_TRUE(attention(inputs.operands(), outputs.views(), c.options, {}).ok());
    }
  }
}

/// The same where a mask hides every key of every row.
TEST(Plan, NothingVisible) {
  for (const Mode mode : kModes) {
    KernelCase c = small_case(mode);
    c.options.mask.align = CausalAlign::kTopLeft;
    c.options.mask.causal = false;
    c.options.mask.window_left = 2;
    c.options.mask.window_right = 2;
    c.seqlen_k = 3;  // rows 0..4 see a key, rows from 5 on none
    const KernelInputs inputs = make_inputs(c);
    const Outputs outputs = attend(c, inputs.operands());
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t s = 0; s < c.seqlen_q; ++s) {
        for (int64_t h = 0; h < c.nheads_q; ++h) {
          ASSERT_EQ(outputs.lse.get(b, s, h, 0) == kMinusInf, s >= 5) << c.name() << " row " << s;
          for (int64_t d = 0; s >= 5 && d < c.head_dim; ++d) {
            ASSERT_EQ(outputs.out.get(b, s, h, d), 0) << c.name() << " row " << s;
          }
        }
      }
    }
  }
}

/// v_granularity and smooth_k say how float operands become codes; modes without those codes
/// ignore them.
/// Keys that no query sees take no memory but their entry in a table.
TEST(Plan, WorkspaceOfAWindow) {
  KernelCase c = small_case(Mode::kAccurate);
  c.seqlen_k = 2000;
  const KernelInputs inputs = make_inputs(c);
  Outputs outputs(c);
  const auto workspace_bytes = [&] {
    const auto plan = AttentionPlan::make(inputs.operands(), outputs.views(), c.options, {});
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    return plan.value().workspace_bytes();
  };
  const size_t whole = workspace_bytes();
  c.options.mask.window_left = 50;  // with 13 queries at most two blocks of 256 keys
  const size_t window = workspace_bytes();
  const auto codes_of_six_blocks = static_cast<size_t>(c.batch * c.nheads_k * 6 * 256 * 2 * 24);
  EXPECT_GT(whole, window + codes_of_six_blocks);
}

TEST(Plan, OptionsOfOtherModesChangeNothing) {
  for (const Mode mode : {Mode::kPaper, Mode::kHalf, Mode::kExact}) {
    KernelCase c = small_case(mode);
    c.options.kv_block = 64;
    const KernelInputs inputs = make_inputs(c);
    const Outputs wanted = attend(c, inputs.operands());
    for (const Granularity granularity : {Granularity::kTensor, Granularity::kChannel,
                                          Granularity::kBlock, Granularity::kBlockChannel}) {
      c.options.v_granularity = granularity;
      const Outputs got = attend(c, inputs.operands());
      EXPECT_EQ(got.out.bytes(), wanted.out.bytes()) << c.name();
      EXPECT_EQ(got.lse.bytes(), wanted.lse.bytes()) << c.name();
    }
    if (mode == Mode::kHalf) continue;
    c.options.smooth_k = false;
    EXPECT_EQ(attend(c, inputs.operands()).out.bytes(), wanted.out.bytes()) << c.name();
  }
}

/// A caller's loop: every index once, never more tasks than threads, the pool handed through.
TEST(Plan, OwnParallelFor) {
  struct Pool {
    std::vector<int64_t> counts;
  } pool;
  Context context = Context::cpu(3);
  context.pool = &pool;
  context.parallel_for = [](void* p, int64_t count, void (*body)(void*, int64_t), void* argument) {
    static_cast<Pool*>(p)->counts.push_back(count);
    for (int64_t i = count - 1; i >= 0; --i) body(argument, i);  // backwards, on one thread
  };
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact}) {
    const KernelCase c = small_case(mode);
    const KernelInputs inputs = make_inputs(c);
    const Outputs wanted = attend(c, inputs.operands());
    Outputs got(c);
    pool.counts.clear();
    const Status status = attention(inputs.operands(), got.views(), c.options, context);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(got.out.bytes(), wanted.out.bytes()) << c.name();
    EXPECT_EQ(got.lse.bytes(), wanted.lse.bytes()) << c.name();
    ASSERT_FALSE(pool.counts.empty());
    for (const int64_t count : pool.counts) EXPECT_TRUE(count >= 1 && count <= 3) << count;
  }
}

}  // namespace
}  // namespace attn8::testing
