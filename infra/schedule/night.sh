#!/bin/sh
# One night: prepare what is new. A second one beside it is refused (the lock), a failed one tells. For cron; systemd needs
# neither, see llada-prepare.service.
set -eu

set -a
. "${LLADA_ENV:-/etc/llada/prepare.env}"
set +a
exec 9>"${LLADA_LOCK:-/var/lib/llada/night.lock}"
if ! flock --nonblock 9; then
  echo "a night is still at work: this one is left out" >&2
  exit 0
fi

code=0
llada prepare llada_8b --tokenizer "$LLADA_BUCKET/tokenizer" --input "$LLADA_BUCKET/raw" --output "$LLADA_BUCKET/data" \
  --no-progress 9>&- || code=$?
if [ "$code" -ne 0 ] && [ -n "${LLADA_ALERT_URL:-}" ]; then
  curl --fail --silent --show-error --max-time 30 --header 'Content-Type: application/json' \
    --data "{\"text\": \"llada prepare on $(hostname) failed with exit code $code\"}" "$LLADA_ALERT_URL" || true
fi
exit "$code"
