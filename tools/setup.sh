#!/bin/sh
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is missing. Takes a fraction of a second when all is there.
#
#   tools/setup.sh build    packages of tools/debian_packages.txt that building and running needs
#   tools/setup.sh test     all packages of that table
#   tools/setup.sh python   the environment .venv of tools/requirements.txt, for the Python tests, and
#                           of tools/requirements-torch.txt where pip can get it
set -eu
cd "$(dirname "$0")/.."

purpose=${1:-}
case $purpose in
  build | test) ;;
  python)
    if ! cmp -s tools/requirements.txt .venv/requirements.txt; then
      # Debian's own Python comes first: the package python3-venv belongs to that one.
      python=/usr/bin/python3
      [ -x "$python" ] || python=python3
      echo "setup: creating .venv"
      "$python" -m venv --clear .venv
      .venv/bin/pip install --quiet --disable-pip-version-check -r tools/requirements.txt
      cp tools/requirements.txt .venv/requirements.txt  # last: marks a complete environment
    fi
    # Tried once: without it, its tests skip and say so.
    if ! cmp -s tools/requirements-torch.txt .venv/requirements-torch.txt; then
      echo "setup: installing torch (CPU) into .venv"
      .venv/bin/pip install --quiet --disable-pip-version-check --only-binary :all: \
        -r tools/requirements-torch.txt ||
        echo "setup: pip has no torch for CPUs here; the tests that need it will be skipped"
      cp tools/requirements-torch.txt .venv/requirements-torch.txt
    fi
    exit 0
    ;;
  *)
    echo "setup: purpose=${purpose:-nothing} must be build, test or python" >&2
    exit 2
    ;;
esac

# Rows "package version" of the table that this purpose needs.
wanted() {
  while read -r package version need; do
    case $package in '' | \#*) continue ;; esac
    if [ "$need" = build ] || [ "$purpose" = test ]; then echo "$package $version"; fi
  done <tools/debian_packages.txt
}

if ! command -v dpkg-query >/dev/null; then
  echo "setup: this is no Debian system; install the equivalents of" \
    "$(wanted | tr '\n' ' ')and call the CMake presets directly (docs/hacking.md)" >&2
  exit 1
fi

# Rows of wanted() that are not installed, or too old.
missing() {
  wanted | while read -r package version; do
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$package" 2>/dev/null |
      sed -n 's/^installed //p' | head -n 1)
    if [ -z "$installed" ] || dpkg --compare-versions "$installed" lt "$version"; then
      echo "$package $version"
    fi
  done
}

packages=$(missing | cut -d ' ' -f 1 | tr '\n' ' ')
if [ -n "$packages" ]; then
  install="apt-get install -y --no-install-recommends $packages"
  if [ "$(id -u)" -eq 0 ]; then
    as_root=
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
  else
    echo "setup: missing packages; as root run: apt-get update && $install" >&2
    exit 1
  fi
  echo "setup: installing $packages"
  $as_root apt-get update -q
  $as_root env DEBIAN_FRONTEND=noninteractive $install
  still=$(missing | tr '\n' ' ')
  if [ -n "$still" ]; then
    echo "setup: this system has no recent enough version of: $still" >&2
    exit 1
  fi
fi
