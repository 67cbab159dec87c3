#!/usr/bin/env bash
# Lint, types and tests on a bare machine. Usage: bash scripts/test.sh [pytest's options, e.g. -m 'not slow']
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
# the report's test looks at the page in a real browser
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && apt-get install -qq -y chromium; } >/dev/null 2>&1 || echo "no chromium: its test is skipped"
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy --no-error-summary
bash scripts/bare.sh
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir build/site
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
