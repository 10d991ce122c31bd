// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>
#include <vector>

#include "kv_cache.hpp"

/// The tables of the paged cache's calls: checked where they are read, and made safe to use.
namespace attn8::cuda {

std::string text(const Extents& e) {
  return "[" + std::to_string(e[0]) + ", " + std::to_string(e[1]) + ", " + std::to_string(e[2]) +
         ", " + std::to_string(e[3]) + "]";
}

Status check_shape(const char* name, const ConstTensorView& view, const Extents& want) {
  if (view.shape == want) return {};
  return invalid(std::string(name) + ".shape=" + text(view.shape) + ", want " + text(want));
}

namespace {

int table_value(const ConstTensorView& view, int64_t i, int64_t j = 0) {
  return static_cast<const int32_t*>(view.data)[i * view.strides[0] + j * view.strides[1]];
}

class Bytes {
 public:
  size_t take(int64_t bytes) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(std::max<int64_t>(bytes, 0)) + 255) / 256 * 256;
    return at;
  }
  [[nodiscard]] size_t total() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace

const AttendEntry& plain_entry(const CudaKvCache::State& s, const CacheCall& call,
                               int64_t nheads_q) {
  const bool few = s.decode_entry != nullptr &&
                   call.seqlen * (nheads_q / s.pages.nheads_k) <= s.decode_entry->rows;
  return few ? *s.decode_entry : *s.entry;
}

Division division_of(const CudaKvCache::State& s, const AttendEntry& entry, const CacheCall& call,
                     int64_t nheads_q) {
  return divide(entry, call.batch, static_cast<int>(nheads_q), s.pages.nheads_k, call.seqlen,
                static_cast<int64_t>(call.max_pages) << s.pages.page_shift, s.multiprocessors);
}

int64_t rows_of(const CacheCall& call, int group) {
  if (!call.ragged) return round_up(static_cast<int64_t>(call.seqlen) * group, kSequencePad);
  return ragged_row(call.total * group, call.batch) + kRaggedRows;
}

int append_chunks(const CacheCall& call) { return (call.seqlen + kAppendChunk - 1) / kAppendChunk; }

CacheLayout lay_out(const CudaKvCache::State& s, const CacheCall& call, int64_t heads) {
  const int64_t ints = 4;
  Bytes bytes;
  CacheLayout at;
  at.table = bytes.take(ints * call.batch * call.max_pages);
  at.seqlens = bytes.take(ints * call.batch);
  at.cu = bytes.take(ints * (call.batch + 1));
  at.bad = bytes.take(ints * call.batch);
  at.raw =
      bytes.take(ints * (static_cast<int64_t>(call.batch) * call.max_pages + 2 * call.batch + 1));
  // Few rows are one group with either kernel; only the number of parts differs.
  const Division division = division_of(s, *s.entry, call, heads);
  const int splits =
      std::max(division.splits, division_of(s, plain_entry(s, call, heads), call, heads).splits);
  const int64_t images = (call.ragged ? 1 : call.batch) * (heads / division.group);
  const int64_t rows = images * rows_of(call, division.group);
  at.q = bytes.take(rows * s.row_bytes());
  at.q_scale = bytes.take(rows * 4);
  at.lse_shift = bytes.take(rows * 4);
  if (splits > 1) {
    const int64_t parts = splits * call.total * heads;
    at.split_out = bytes.take(parts * split_row_floats(static_cast<int>(s.options.head_dim)) * 4);
    at.split_lse = bytes.take(parts * 4);
  }
  // An append and attention share what follows the tables.
  const auto tables = static_cast<int64_t>(at.q);
  at.sums = at.q;
  at.bytes = std::max(bytes.total(),
                      static_cast<size_t>(tables + int64_t{8} * call.batch * s.pages.nheads_k *
                                                       append_chunks(call) * s.row_bytes()));
  return at;
}

namespace {

Status check_int32(const char* name, const ConstTensorView& view, bool on_host, int device) {
  if (view.dtype != DType::kInt32) {
    return invalid(std::string(name) + ".dtype=" + std::string(to_string(view.dtype)) +
                   ", want int32");
  }
  if ((view.device.type == DeviceType::kCpu) != on_host) {
    return invalid(std::string(name) + ".device differs from block_table.device");
  }
  return on_host ? Status() : check_memory(view.data, name, device);
}

/// Lengths and pages of tables that lie on the host.
Status check_on_host(const CudaKvCache::State& s, const CudaKvTables& tables, const CacheCall& call,
                     bool appends) {
  for (int b = 0; b < call.batch; ++b) {
    const std::string at = "[" + std::to_string(b) + "]";
    int64_t added = call.seqlen;
    if (call.ragged) {
      const int64_t first = table_value(*tables.cu_seqlens, b);
      const int64_t last = table_value(*tables.cu_seqlens, b + 1);
      added = last - first;
      if (first < 0 || last < first || last > call.total) {
        return invalid("cu_seqlens" + at + "=" + std::to_string(first) + " and then " +
                       std::to_string(last) + ", want them not to decrease, from 0 to " +
                       std::to_string(call.total));
      }
      if (added > call.seqlen) {
        return invalid("max_seqlen=" + std::to_string(call.seqlen) + ", sequence " +
                       std::to_string(b) + " has " + std::to_string(added) + " tokens");
      }
    }
    const int64_t seqlen = table_value(tables.cache_seqlens, b);
    const int64_t end = seqlen + (appends ? added : 0);
    if (seqlen < 0 || end > call.max_keys) {
      return invalid("cache_seqlens" + at + "=" + std::to_string(seqlen) +
                     (appends ? " and " + std::to_string(added) + " more" : "") +
                     ", block_table or attn_mask has room for " + std::to_string(call.max_keys));
    }
    for (int64_t page = 0; page << s.pages.page_shift < end; ++page) {
      const int value = table_value(tables.block_table, b, page);
      if (value < 0 || value >= s.pages.num_pages) {
        return invalid("block_table[" + std::to_string(b) + ", " + std::to_string(page) +
                       "]=" + std::to_string(value) + ", there are " +
                       std::to_string(s.pages.num_pages) + " pages");
      }
    }
  }
  return {};
}

}  // namespace

Result<CacheCall> call_of(const CudaKvCache::State& s, const Extents& tokens,
                          const CudaKvTables& tables) {
  CacheCall call;
  const Extents& table = tables.block_table.shape;
  if (table[0] < 1 || table[1] < 1 || table[2] != 1 || table[3] != 1 || table[0] > 65535 ||
      table[1] > kNoLimit / 4 >> s.pages.page_shift) {
    return invalid("block_table.shape=" + text(table) + ", want [batch, max_pages, 1, 1]");
  }
  call.batch = static_cast<int>(table[0]);
  call.max_pages = static_cast<int>(table[1]);
  call.max_keys = table[1] << s.pages.page_shift;
  call.ragged = tables.cu_seqlens.has_value();
  call.on_host = tables.block_table.device.type == DeviceType::kCpu;
  const int64_t want_batch = call.ragged ? 1 : call.batch;
  if (tokens[0] != want_batch || tokens[1] < 0 || tokens[1] > kNoLimit / 4) {
    return invalid("tokens of shape " + text(tokens) + ", want shape[0]=" +
                   std::to_string(want_batch) + (call.ragged ? " with cu_seqlens" : ""));
  }
  if (tokens[2] * call.batch > 65535) {
    return Status(StatusCode::kUnsupported, "tokens of shape " + text(tokens) + " in " +
                                                std::to_string(call.batch) +
                                                " sequences, CUDA takes batch * heads up to 65535");
  }
  call.total = tokens[0] * tokens[1];
  call.seqlen = static_cast<int>(tokens[1]);
  if (tables.max_seqlen < 0) {
    return invalid("max_seqlen=" + std::to_string(tables.max_seqlen) + ", want 0 or more");
  }
  if (call.ragged && tables.max_seqlen > 0) {
    call.seqlen = static_cast<int>(std::min<int64_t>(call.seqlen, tables.max_seqlen));
  }
  return call;
}

Status prepare_tables(const CudaKvCache::State& s, const CudaKvTables& tables,
                      const CacheCall& call, bool appends, const CacheLayout& at,
                      std::span<std::byte> workspace, cudaStream_t stream) {
  if (workspace.size() < at.bytes) {
    return invalid("workspace has " + std::to_string(workspace.size()) + " bytes, want " +
                   std::to_string(at.bytes));
  }
  if (reinterpret_cast<uintptr_t>(workspace.data()) % 256 != 0) {
    return invalid("workspace.data() wants an alignment of 256 bytes");
  }
  Status checks[] = {
      check_shape("cache_seqlens", tables.cache_seqlens, {call.batch, 1, 1, 1}),
      call.ragged ? check_shape("cu_seqlens", *tables.cu_seqlens, {call.batch + 1, 1, 1, 1})
                  : Status(),
      check_int32("block_table", tables.block_table, call.on_host, s.device),
      check_int32("cache_seqlens", tables.cache_seqlens, call.on_host, s.device),
      call.ragged ? check_int32("cu_seqlens", *tables.cu_seqlens, call.on_host, s.device)
                  : Status(),
      check_memory(workspace.data(), "workspace", s.device)};
  for (Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (call.on_host) {
    if (Status status = check_on_host(s, tables, call, appends); !status.ok()) return status;
  }
  const auto ints_at = [&](size_t offset) {
    return reinterpret_cast<int*>(workspace.data() + offset);
  };
  TablesParams p{};
  p.block_table = static_cast<const int*>(tables.block_table.data);
  p.block_table_stride_batch = tables.block_table.strides[0];
  p.block_table_stride_page = tables.block_table.strides[1];
  p.cache_seqlens = static_cast<const int*>(tables.cache_seqlens.data);
  p.cache_seqlens_stride = tables.cache_seqlens.strides[0];
  if (call.ragged) {
    p.cu_seqlens = static_cast<const int*>(tables.cu_seqlens->data);
    p.cu_seqlens_stride = tables.cu_seqlens->strides[0];
  }
  if (call.on_host) {
    std::vector<int> raw;
    for (int b = 0; b < call.batch; ++b) {
      for (int page = 0; page < call.max_pages; ++page) {
        raw.push_back(table_value(tables.block_table, b, page));
      }
    }
    for (int b = 0; b < call.batch; ++b) raw.push_back(table_value(tables.cache_seqlens, b));
    for (int b = 0; call.ragged && b <= call.batch; ++b) {
      raw.push_back(table_value(*tables.cu_seqlens, b));
    }
    // Copied before the call returns, because the memory is pageable.
    const cudaError_t error = cudaMemcpyAsync(ints_at(at.raw), raw.data(), raw.size() * 4,
                                              cudaMemcpyHostToDevice, stream);
    if (error != cudaSuccess) return device_status(error, "cudaMemcpyAsync");
    p.block_table = ints_at(at.raw);
    p.block_table_stride_batch = call.max_pages;
    p.block_table_stride_page = 1;
    p.cache_seqlens = p.block_table + static_cast<int64_t>(call.batch) * call.max_pages;
    p.cache_seqlens_stride = 1;
    if (call.ragged) {
      p.cu_seqlens = p.cache_seqlens + call.batch;
      p.cu_seqlens_stride = 1;
    }
  }
  p.batch = call.batch;
  p.max_pages = call.max_pages;
  p.num_pages = s.pages.num_pages;
  p.page_shift = s.pages.page_shift;
  p.seqlen = call.seqlen;
  p.max_seqlen = call.seqlen;
  p.max_keys = static_cast<int>(std::min<int64_t>(call.max_keys, kNoLimit / 4));
  p.total = static_cast<int>(call.total);
  p.appends = appends;
  p.checked_table = ints_at(at.table);
  p.checked_seqlens = ints_at(at.seqlens);
  p.checked_cu = ints_at(at.cu);
  p.bad = ints_at(at.bad);
  launch_cache<CheckTables>(p, call.batch, 1, stream);
  return device_status(cudaGetLastError(), "launching the kernel that checks the tables");
}

}  // namespace attn8::cuda
