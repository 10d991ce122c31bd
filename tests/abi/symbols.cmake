# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Fails when the shared library exports anything but the functions of attn8.h and names of namespace
# attn8, or lacks a function that attn8.h declares.
# Arguments (-D): NM, LIBRARY, HEADER
cmake_minimum_required(VERSION 3.25)
execute_process(COMMAND "${NM}" --dynamic --defined-only --extern-only "${LIBRARY}"
  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
list(TRANSFORM symbols REPLACE "^.* " "")

file(READ "${HEADER}" header)
string(REGEX MATCHALL "ATTN8_API [a-z0-9_ *]*(attn8_[a-z0-9_]+)\\(" declarations "${header}")
list(TRANSFORM declarations REPLACE "^.*(attn8_[a-z0-9_]+)\\($" "\\1")
list(LENGTH declarations declared)
if(declared LESS 20)
  message(FATAL_ERROR "found only ${declared} functions in ${HEADER}")
endif()

foreach(function IN LISTS declarations)
  if(NOT function IN_LIST symbols)
    message(SEND_ERROR "attn8.h declares ${function}, ${LIBRARY} does not export it")
  endif()
endforeach()
set(cxx 0)
foreach(symbol IN LISTS symbols)
  if(symbol MATCHES "^_ZNK?5attn8")
    math(EXPR cxx "${cxx} + 1")
  elseif(NOT symbol IN_LIST declarations)
    message(SEND_ERROR "${LIBRARY} exports ${symbol}")
  endif()
endforeach()
if(cxx EQUAL 0)
  message(SEND_ERROR "${LIBRARY} exports no C++ API")
endif()
message(STATUS "${declared} functions of attn8.h and ${cxx} of C++ exported, nothing else")
