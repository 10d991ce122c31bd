// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Marks what the shared library exports; every other symbol is hidden.
#if defined(_WIN32)
#define ATTN8_API
#else
#define ATTN8_API __attribute__((visibility("default")))
#endif
