#!/bin/sh
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# Installs the libraries of requirements.txt into build/peers_venv and builds the library that
# times attn8 itself. A library that cannot be installed is named and left out of the comparison.
set -eu
cd "$(dirname "$0")/../.."

venv=build/peers_venv
python=/usr/bin/python3  # Debian's own: the package python3-venv belongs to that one
[ -x "$python" ] || python=python3
mkdir -p build
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
export CMAKE_ARGS="-DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)"
missing=
for requirement in $(sed -n 's/^\([a-z].*==.*\)$/\1/p' benchmarks/peers/requirements.txt); do
  "$venv/bin/pip" install --quiet --disable-pip-version-check "$requirement" ||
    missing="$missing $requirement"
done

tools/setup.sh test
cmake --preset release
cmake --build --preset release --parallel "$(nproc)" --target attn8_cli attn8_peers
[ -z "$missing" ] || echo "setup: could not be installed and will be left out:$missing" >&2
