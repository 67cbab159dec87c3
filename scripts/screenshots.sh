#!/usr/bin/env bash
# Pictures of a report as a browser shows it, light and dark. Usage: screenshots.sh REPORT.html OUT_FOLDER [HEIGHT]
# docs/report.png is the light one of the demo's report: screenshots.sh demo/report.html docs 1500
set -euo pipefail
page=$(realpath "$1") out=$2 height=${3:-3600} profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
mkdir -p "$out"
for scheme in dark light; do # Chromium counts them so: 0, 1
    number=$([ "$scheme" = light ] && echo 1 || echo 0)
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
        --blink-settings=preferredColorScheme="$number" --window-size=1280,"$height" \
        --screenshot="$out/report-$scheme.png" "file://$page" >/dev/null 2>&1
done
echo "$out/report-light.png $out/report-dark.png"
