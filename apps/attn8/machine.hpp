// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nlohmann/json.hpp>
#include <string>

namespace attn8::app {

/// The processor's own name, or "unknown".
std::string cpu_name();

/// What a published figure must say about where it was measured: cpu, cores, caches_bytes,
/// compiler, openmp settings.
nlohmann::ordered_json machine_json();

}  // namespace attn8::app
