#!/usr/bin/env bash
# Removes what runs have made, for `make clean`: says what it is first, and asks, since results may be days of computing.
set -euo pipefail
cd "$(dirname "$0")/.."

results=$(find -H results -mindepth 1 -maxdepth 1 ! -name .gitkeep 2>/dev/null || true)
if [ -n "$results" ] && [ "${1:-}" != --yes ]; then
  echo "make clean: this removes all results, logs and caches:" >&2
  du -sh results/* >&2
  echo "  $(find -H results -name provenance.json | wc -l) artifacts in all" >&2
  if ! [ -t 0 ]; then
    echo "make clean: nothing was removed; to remove it without being asked: make clean YES=1" >&2
    exit 1
  fi
  read -r -p "Remove them? [y/N] " answer
  case $answer in
    y | Y | yes) ;;
    *)
      echo "make clean: nothing was removed" >&2
      exit 1
      ;;
  esac
fi
find -H results -mindepth 1 -maxdepth 1 ! -name .gitkeep -exec rm -rf {} +
rm -rf logs .snakemake build .pytest_cache .mypy_cache .ruff_cache .hypothesis
find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
