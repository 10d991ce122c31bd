# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Warnings of every target of this project; errors only where a preset asks for it, so that a newer
# compiler never breaks a user's build.
function(attn8_enable_warnings target)
  target_compile_options(${target} PRIVATE
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wextra-semi)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # Wrong about "literal" + std::string (https://gcc.gnu.org/PR105651).
    target_compile_options(${target} PRIVATE -Wno-restrict)
  endif()
  if(ATTN8_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
