#!/usr/bin/env bash
# From nothing to a selected data set: makes .venv, installs the package, runs the whole method on real data.
# Usage: bash scripts/demo.sh [options of `icons demo`]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh demo
exec .venv/bin/icons demo "$@"
