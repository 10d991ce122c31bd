# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Installs BUILD_DIR into a clean prefix below WORK_DIR and builds and runs consumer.cpp against it:
# by find_package with both libraries, and by pkg-config with the shared one. The same with the C
# example and the shared library.
# Arguments (-D): BUILD_DIR WORK_DIR C_COMPILER CXX_COMPILER BUILD_TYPE
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(c_example "${CMAKE_CURRENT_LIST_DIR}/../../examples/04_c_abi.c")
file(REMOVE_RECURSE "${WORK_DIR}")
set(prefix "${WORK_DIR}/prefix")
run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${prefix}")
run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK_DIR}/build" -G Ninja
  "-DCMAKE_PREFIX_PATH=${prefix}" "-DC_EXAMPLE=${c_example}" "-DCMAKE_C_COMPILER=${C_COMPILER}"
  "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}")
run("${CMAKE_COMMAND}" --build "${WORK_DIR}/build")
run("${WORK_DIR}/build/consumer_attn8")
run("${WORK_DIR}/build/consumer_static")
run("${WORK_DIR}/build/consumer_c")

file(GLOB_RECURSE pc_file "${prefix}/*/attn8.pc")
cmake_path(GET pc_file PARENT_PATH pc_dir)
cmake_path(GET pc_dir PARENT_PATH lib_dir)
execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env "PKG_CONFIG_PATH=${pc_dir}" pkg-config --cflags --libs attn8
  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
run("${CXX_COMPILER}" -std=c++20 "${CMAKE_CURRENT_LIST_DIR}/consumer.cpp"
  -o "${WORK_DIR}/consumer_pkg_config" ${flags} "-Wl,-rpath,${lib_dir}")
run("${WORK_DIR}/consumer_pkg_config")
run("${C_COMPILER}" -std=c11 "${c_example}" -o "${WORK_DIR}/consumer_c_pkg_config" ${flags}
  "-Wl,-rpath,${lib_dir}")
run("${WORK_DIR}/consumer_c_pkg_config")
