#!/usr/bin/env bash
# Sets up .venv from requirements.lock, for `make env`. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

# An installation that was cut off leaves this file, with the number of its process: the next one starts over.
busy=.venv/.installing

stop() {
  echo "make env: $1" >&2
  exit 1
}

find_python() {
  local python
  for python in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  stop "no usable ${PYTHON:-python3.11}: install Python 3.11 or newer with its venv module
  (Debian and Ubuntu: apt-get install python3.11 python3.11-venv; macOS: brew install python@3.11),
  or name one: make env PYTHON=/path/to/python3.11"
}

# pip's output as one line that counts; its warnings and errors go to stderr as they are.
count_packages() {
  local total n=0 word rest
  total=$(grep -c '==' requirements.lock)
  while read -r word rest; do
    case $word in
      Collecting | Requirement)
        n=$((n + 1))
        if [ -t 2 ]; then printf '\r  found %d packages (%d and their needs are asked for)' "$n" "$total" >&2; fi
        ;;
      Installing)
        if [ -t 2 ]; then printf '\r\033[K  installing them\n' >&2; fi
        ;;
    esac
  done
}

# What is linked here is another checkout's: to install into it would let that one run this one's code.
if [ -L .venv ]; then
  echo "make env: .venv is a link to $(readlink -f .venv), which another checkout has set up: it is used as it is, with
  the code of this one first (PYTHONPATH=$PWD/src); for one of its own: rm .venv && make env" >&2
  [ -x .venv/bin/python ] || stop "$(readlink .venv) has no bin/python: rm .venv && make env"
  exit 0
fi
if [ -f $busy ] && kill -0 "$(cat $busy)" 2>/dev/null; then
  stop "process $(cat $busy) is setting up .venv already; try again when it has ended (else: rm $busy)"
fi
if [ -f $busy ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "make env: setting up .venv with $("$python" --version) from requirements.lock; this takes some minutes" >&2
  rm -rf .venv && mkdir .venv && echo $$ >$busy
  "$python" -m venv .venv
fi
echo $$ >$busy
.venv/bin/python -m pip install -r requirements.lock | count_packages
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
.venv/bin/python -m saeflow.kernels # compiles, so that no job has to
rm $busy
touch .venv/.installed
