# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# The attention kernels that are built. Each becomes one source file in the build tree, so that they
# compile in parallel, and one line of instances.inc, which backend.cu reads.

# Those of this machine's GPUs; where it has none, what runs on every chip from Ampere on: the code
# for sm_80 on sm_86 and sm_89, too, its PTX on later ones.
set(architectures "")
find_program(ATTN8_NVIDIA_SMI nvidia-smi)
mark_as_advanced(ATTN8_NVIDIA_SMI)
if(ATTN8_NVIDIA_SMI)
  execute_process(COMMAND "${ATTN8_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET)
  if(failed EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${found}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" capability "${capability}")
      if(capability GREATER_EQUAL 80)
        list(APPEND architectures "${capability}-real")
      endif()
    endforeach()
    list(REMOVE_DUPLICATES architectures)
  endif()
endif()
set(has_hopper ON)
if(architectures AND NOT "90-real" IN_LIST architectures)
  set(has_hopper OFF)
endif()
if(NOT architectures)
  set(architectures 80-real 80-virtual)
endif()
set(ATTN8_CUDA_ARCHITECTURES "${architectures}" CACHE STRING
    "Architectures of the mma.sync kernels and the quantize kernels")
option(ATTN8_CUDA_SM90A "Build the Hopper kernels (wgmma)" ${has_hopper})

set(ATTN8_CUDA_INSTANCE_DIR ${CMAKE_CURRENT_BINARY_DIR}/instances)
set(ATTN8_CUDA_SM80_SOURCES)
set(ATTN8_CUDA_EVERYWHERE_SOURCES)
set(ATTN8_CUDA_SM90A_SOURCES)
set(instance_lines "")

# attn8_cuda_instance(<family> <weights> <scores> <head_dim> <kernel type without the last two>
#                     <least blocks per multiprocessor>)
macro(attn8_cuda_instance family weights scores head_dim kernel min_blocks)
  string(TOLOWER ${weights} weights_name)
  if(NOT ${scores} STREQUAL Plain)
    string(TOLOWER ${weights_name}_${scores} weights_name)
  endif()
  set(name attend_${weights_name}_${family}_d${head_dim})
  string(REPLACE "sm" "kSm" family_enumerator ${family})
  string(REPLACE "decode" "kDecode" family_enumerator ${family_enumerator})
  set(source ${ATTN8_CUDA_INSTANCE_DIR}/${name}.cu)
  file(CONFIGURE OUTPUT ${source} @ONLY CONTENT "// Written by instances.cmake.
#include \"attend_${family}.hpp\"
#include \"launch.hpp\"
namespace attn8::cuda {
AttendEntry ${name}() {
  return attend_entry<${kernel}, Weights::k${weights}, Scores::k${scores}>, ${min_blocks}>(
      \"${name}\", Family::${family_enumerator}, Weights::k${weights}, Scores::k${scores});
}
}  // namespace attn8::cuda
")
  if(${family} STREQUAL sm90)
    list(APPEND ATTN8_CUDA_SM90A_SOURCES ${source})
  elseif(${family} STREQUAL decode OR NOT ${has_sm90})
    list(APPEND ATTN8_CUDA_EVERYWHERE_SOURCES ${source})
  else()
    list(APPEND ATTN8_CUDA_SM80_SOURCES ${source})
  endif()
  string(APPEND instance_lines "ATTN8_CUDA_INSTANCE(${name})\n")
endmacro()

# What few callers need has one width less, and what Hopper has no kernel for runs the others there.
foreach(kernel Folded.Plain Plain.Plain Paper.Plain Folded.Softcap Folded.Biased Plain.Biased
               Paper.Biased Half.Plain Half.Softcap Half.Biased)
  string(REPLACE "." ";" kernel ${kernel})
  list(GET kernel 0 weights)
  list(GET kernel 1 scores)
  set(kv_block 128)
  set(dims 128 256)
  if(kernel MATCHES "Plain;Biased|Paper;Biased")
    set(dims 128)  # at 256 they spill in their loop
  endif()
  set(has_sm90 ${ATTN8_CUDA_SM90A})
  if(${weights} STREQUAL Half)
    set(kv_block 64)
    set(has_sm90 OFF)
  elseif(${scores} STREQUAL Biased)
    set(has_sm90 OFF)
  elseif(${scores} STREQUAL Plain)
    set(dims 96 128 256)
  endif()
  # Head dim 64 leaves room for two blocks per multiprocessor.
  attn8_cuda_instance(sm80 ${weights} ${scores} 64 "AttendSm80<64, ${kv_block}, 4" 2)
  foreach(head_dim ${dims})
    set(warps 8)
    if(head_dim EQUAL 256 AND NOT ${scores} STREQUAL Plain AND NOT ${weights} STREQUAL Half)
      set(warps 4)  # eight and what they keep of their rows are more than sm_80 has for a block
    endif()
    attn8_cuda_instance(sm80 ${weights} ${scores} ${head_dim}
                        "AttendSm80<${head_dim}, ${kv_block}, ${warps}" 1)
  endforeach()
  if(has_sm90)
    foreach(head_dim 64 ${dims})
      set(kv_block 256)
      if(head_dim EQUAL 256)
        set(kv_block 128)
      endif()
      attn8_cuda_instance(sm90 ${weights} ${scores} ${head_dim}
                          "AttendSm90<${head_dim}, ${kv_block}" 1)
    endforeach()
  endif()
endforeach()
# For few queries. What a block of them has in shared memory leaves room for a third per
# multiprocessor, but two are what keys are divided among: more parts take longer to join.
foreach(weights Folded Plain)
  attn8_cuda_instance(decode ${weights} Plain 64 "AttendDecode<64, 4, 2" 2)
  attn8_cuda_instance(decode ${weights} Plain 96 "AttendDecode<96, 2, 2" 2)
  attn8_cuda_instance(decode ${weights} Plain 128 "AttendDecode<128, 2, 2" 2)
endforeach()
file(CONFIGURE OUTPUT ${ATTN8_CUDA_INSTANCE_DIR}/instances.inc CONTENT "${instance_lines}")
