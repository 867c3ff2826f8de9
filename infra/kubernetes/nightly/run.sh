#!/bin/sh
# One night: create the RayJob, or find the one that is still at work, and wait for its end. Exit code 0 when it has succeeded, 3
# when it has failed (the Job has too then, of which infra/monitoring/alerts.yaml tells); any other: this waiting has failed.
set -eu

unfinished='{{range .items}}{{if not .status.endTime}}{{.metadata.name}}{{"\n"}}{{end}}{{end}}'
job=$(kubectl get rayjobs --selector llada/schedule=prepare --output go-template="$unfinished" | head -n 1)
if [ -n "$job" ]; then
  echo "$job is still at work: waiting for it, and creating none"
else
  job=$(kubectl create --filename "${RAYJOB:-/nightly/rayjob.yaml}" --output 'jsonpath={.metadata.name}')
  echo "created $job"
fi

while :; do
  # "<status of the job> <status of the RayJob>"; the server may be away for a while.
  status=$(kubectl get rayjob "$job" --output 'jsonpath={.status.jobStatus} {.status.jobDeploymentStatus}') || status=unknown
  case "$status" in
    "SUCCEEDED Complete") echo "$job: $status"; exit 0 ;;
    *" Failed" | *" Complete" | *" ValidationFailed")
      echo "$job: $status: $(kubectl get rayjob "$job" --output 'jsonpath={.status.message}')" >&2
      exit 3 ;;
  esac
  sleep "${POLL_S:-30}"
done
