# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# Resolves ATTN8_CUDA to ON or OFF.

set(ATTN8_CUDA AUTO CACHE STRING "Build the CUDA backend: ON, OFF, or AUTO: where nvcc 13 is found")
set_property(CACHE ATTN8_CUDA PROPERTY STRINGS AUTO ON OFF)

if(ATTN8_CUDA STREQUAL "AUTO")
  find_package(CUDAToolkit 13 QUIET)
  set(ATTN8_CUDA OFF)
  if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE)
    set(ATTN8_CUDA ON)
  endif()
  message(STATUS "ATTN8_CUDA=AUTO: ${ATTN8_CUDA}")
elseif(ATTN8_CUDA)
  find_package(CUDAToolkit 13 REQUIRED)
endif()
if(ATTN8_CUDA AND NOT CMAKE_CUDA_COMPILER AND CUDAToolkit_NVCC_EXECUTABLE)
  set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")  # it may not be on the PATH
endif()
