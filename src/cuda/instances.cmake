# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# The attention kernels that are built. Each becomes one source file in the build tree, so that they
# compile in parallel, and one line of instances.inc, which backend.cu reads.

set(ATTN8_CUDA_ARCHITECTURES "80-real;86-real;89-real;80-virtual" CACHE STRING
    "Architectures of the mma.sync kernels and the quantize kernels; the PTX runs on later chips")
option(ATTN8_CUDA_SM90A "Build the Hopper kernels (wgmma)" ON)

set(ATTN8_CUDA_INSTANCE_DIR ${CMAKE_CURRENT_BINARY_DIR}/instances)
set(ATTN8_CUDA_SM80_SOURCES)
set(ATTN8_CUDA_EVERYWHERE_SOURCES)
set(ATTN8_CUDA_SM90A_SOURCES)
set(instance_lines "")

# attn8_cuda_instance(<family> <weights> <scores> <head_dim> <kernel type without the last two>
#                     <least blocks per multiprocessor>)
macro(attn8_cuda_instance family weights scores head_dim kernel min_blocks)
  string(TOLOWER ${weights} weights_name)
  if(${scores} STREQUAL Changed)
    string(APPEND weights_name _changed)
  endif()
  set(name attend_${weights_name}_${family}_d${head_dim})
  string(REPLACE "sm" "kSm" family_enumerator ${family})
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
  elseif(${weights} STREQUAL Half)
    # There is no Hopper kernel that would run in its place.
    list(APPEND ATTN8_CUDA_EVERYWHERE_SOURCES ${source})
  else()
    list(APPEND ATTN8_CUDA_SM80_SOURCES ${source})
  endif()
  string(APPEND instance_lines "ATTN8_CUDA_INSTANCE(${name})\n")
endmacro()

foreach(kernel Folded.Plain Plain.Plain Paper.Plain Half.Plain Folded.Changed Half.Changed)
  string(REPLACE "." ";" kernel ${kernel})
  list(GET kernel 0 weights)
  list(GET kernel 1 scores)
  set(kv_block 128)
  if(${weights} STREQUAL Half)
    set(kv_block 64)
  endif()
  # Head dim 64 leaves room for two blocks per multiprocessor.
  attn8_cuda_instance(sm80 ${weights} ${scores} 64 "AttendSm80<64, ${kv_block}, 4" 2)
  foreach(head_dim 96 128 256)
    attn8_cuda_instance(sm80 ${weights} ${scores} ${head_dim}
                        "AttendSm80<${head_dim}, ${kv_block}, 8" 1)
  endforeach()
  if(ATTN8_CUDA_SM90A AND NOT ${weights} STREQUAL Half)
    foreach(head_dim 64 96 128)
      attn8_cuda_instance(sm90 ${weights} ${scores} ${head_dim} "AttendSm90<${head_dim}, 256" 1)
    endforeach()
    attn8_cuda_instance(sm90 ${weights} ${scores} 256 "AttendSm90<256, 128" 1)
  endif()
endforeach()
file(CONFIGURE OUTPUT ${ATTN8_CUDA_INSTANCE_DIR}/instances.inc CONTENT "${instance_lines}")
