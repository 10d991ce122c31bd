// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Umbrella of the C++ API.
#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "attn8/kv_cache.hpp"
#include "attn8/merge.hpp"
#include "attn8/quantize.hpp"
#include "attn8/reference.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"
