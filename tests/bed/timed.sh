#!/bin/bash
# timed.sh NAME COMMAND...: says what begins, and how it ended and how long it took.
set -euo pipefail
name=$1
shift
started=$EPOCHREALTIME
printf '==> %s\n' "$name" >&2
status=0
"$@" || status=$?
seconds=$(awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
if ((status == 0)); then
    printf '==> %s: ok, %s s\n' "$name" "$seconds" >&2
else
    printf '==> %s: FAILED, %s s\n' "$name" "$seconds" >&2
fi
exit "$status"
