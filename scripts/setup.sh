#!/usr/bin/env bash
# Makes .venv (or $VENV) with the package and one set of extras; does nothing when that is already so.
# Usage: setup.sh [EXTRA]
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-} venv=${VENV:-.venv}
stamp=$venv/.installed-$extra
wanted=$(cat pyproject.toml scripts/constraints.txt | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${extra:+[$extra]}"
echo "$wanted" >"$stamp"
