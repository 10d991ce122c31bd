# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Instruction-set flags, one set per file of src/cpu/isa, chosen by the start of the file's name.
# No other file has any: whatever runs before the CPU was asked must run on every CPU.
set(ATTN8_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
# Without -mavxvnni: vpdpbusd stands in asm statements, and the VEX and EVEX files differ in nothing
# else.
set(ATTN8_ISA_FLAGS_avx_vnni ${ATTN8_ISA_FLAGS_avx2})
set(ATTN8_ISA_FLAGS_avx512_vnni
    -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mfma -mf16c)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Each of these computes addresses and loads ahead of where attend_skewed has registers for them.
  list(APPEND ATTN8_ISA_FLAGS_avx512_vnni -fno-tree-pre -fno-code-hoisting -fno-ivopts)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC's own AVX-512 headers warn of themselves (https://gcc.gnu.org/PR105593).
  list(APPEND ATTN8_ISA_FLAGS_avx512_vnni -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# The portable file passes 64-byte vectors between its own functions only, so their calling
# convention, which GCC warns has changed between releases, does not matter.
set(ATTN8_ISA_FLAGS_scalar -Wno-psabi)

# Gives each file of `sources` (a variable's name) its flags, and drops from that list the files of
# another processor family.
function(attn8_set_isa_flags sources)
  set(kept ${${sources}})
  foreach(isa IN ITEMS scalar avx2 avx_vnni avx512_vnni)
    set(files ${${sources}})
    list(FILTER files INCLUDE REGEX "/cpu/isa/${isa}[^/]*\\.cpp$")
    if(isa STREQUAL "scalar" OR CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
      set_property(SOURCE ${files} APPEND PROPERTY COMPILE_OPTIONS ${ATTN8_ISA_FLAGS_${isa}})
    elseif(files)
      list(REMOVE_ITEM kept ${files})
    endif()
  endforeach()
  set(${sources} ${kept} PARENT_SCOPE)
endfunction()
