# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Fails when an object of src/cpu/isa that was compiled with instruction-set flags defines a weak
# symbol outside its own namespace attn8::<isa>. The linker keeps one copy of a weak symbol for the
# whole program: an inline function of the standard library or of our headers, compiled here with
# AVX-512, could be the copy that a CPU without AVX-512 calls.
# Arguments (-D): NM, OBJECTS (object files separated by commas)
string(REPLACE "," ";" objects "${OBJECTS}")
set(checked 0)
foreach(object IN LISTS objects)
  if(NOT object MATCHES "/cpu/isa/(avx2|avx_vnni_evex|avx_vnni|avx512_vnni)[^/]*$")
    continue()
  endif()
  set(isa "${CMAKE_MATCH_1}")
  string(LENGTH "${isa}" length)
  math(EXPR checked "${checked} + 1")
  execute_process(COMMAND "${NM}" --defined-only "${object}"
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  # W, V and u are nm's letters for weak and unique symbols.
  list(FILTER symbols INCLUDE REGEX " [WwVvu] ")
  # A mangled name spells each namespace with its length: _ZN5attn84avx23fooEv.
  list(FILTER symbols EXCLUDE REGEX " _Z(TV|TI|TS|GV)?N?K?5attn8${length}${isa}")
  # Points at the runtime's exception handler; holds no instructions.
  list(FILTER symbols EXCLUDE REGEX " DW\\.ref\\.__gxx_personality_v0$")
  foreach(symbol IN LISTS symbols)
    message(SEND_ERROR "${object}: weak symbol outside attn8::${isa}: ${symbol}")
  endforeach()
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no object of an instruction set in: ${OBJECTS}")
endif()
message(STATUS "${checked} objects define no weak symbol outside their namespace")
