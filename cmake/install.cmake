# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0

# Headers, both libraries, the command line, find_package(attn8) and attn8.pc.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(ATTN8_CMAKE_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/attn8")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/attn8" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS attn8_static attn8_shared
  EXPORT attn8-targets
  INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(TARGET attn8_cli)
  install(TARGETS attn8_cli)
endif()
install(EXPORT attn8-targets NAMESPACE attn8:: DESTINATION "${ATTN8_CMAKE_DIR}")

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/attn8-config.cmake.in" "${PROJECT_BINARY_DIR}/attn8-config.cmake"
  INSTALL_DESTINATION "${ATTN8_CMAKE_DIR}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/attn8-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/attn8-config.cmake" "${PROJECT_BINARY_DIR}/attn8-config-version.cmake"
  DESTINATION "${ATTN8_CMAKE_DIR}")

# The prefix follows the file, so that an installed tree may be moved.
file(RELATIVE_PATH ATTN8_PC_TO_PREFIX
  "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
if(OpenMP_CXX_FOUND)
  set(ATTN8_PC_PRIVATE_LIBS "${OpenMP_CXX_FLAGS}")
endif()
configure_file("${PROJECT_SOURCE_DIR}/cmake/attn8.pc.in" "${PROJECT_BINARY_DIR}/attn8.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/attn8.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
