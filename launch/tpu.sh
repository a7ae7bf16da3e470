#!/usr/bin/env bash
# Cloud TPU for gqa_t5x: see usage below, and launch/README.md.
# shellcheck disable=SC2153  # names that launch/env.sh sets
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run=false

usage() {
  cat <<'TEXT'
Usage: launch/tpu.sh [--dry_run] COMMAND

  create      request a TPU (queued resource); its hosts install everything and train
  watch       create, and create anew whenever it is taken away, until training is done
  status      show the state of the request
  check       show how many devices every host sees
  run CMD...  check, then run a command on every host at once, in the repository
  benchmark FLAGS...  time decoding on a slice of one host, with a trace for xprof
  logs [N]    print the log of host N (0), from the bucket
  delete      delete the TPU and its request
  jobset      print a JobSet for GKE, the other way to run the same

Names, zone and bucket come from launch/env.sh (launch/env.example.sh says which), or
from the environment. --dry_run prints each command and runs none.
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 1
}

require() {
  local name missing=()
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || missing+=("$name")
  done
  if ((${#missing[@]})); then
    fail "not set: ${missing[*]}. Copy launch/env.example.sh to launch/env.sh and fill" \
      'them in, or export them.'
  fi
}

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

runtime_version() {
  case "$ACCELERATOR_TYPE" in
    v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *)
      fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is none of v3-*, v4-*, v5litepod-*," \
        'v5p-*, v6e-*.'
      ;;
  esac
}

queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$NAME" "--project=$PROJECT" \
    "--zone=$ZONE" "$@"
}

create() {
  require DEVICES REPOSITORY COMMIT
  local tier=() version
  case "$PROVISIONING" in
    spot) tier=(--spot) ;;
    reserved) tier=(--reserved) ;;
    on-demand) ;;
    *) fail "PROVISIONING=$PROVISIONING; choose spot, reserved or on-demand." ;;
  esac
  version=$(runtime_version)
  # gcloud's ^X^: values are separated by X, a mark that TRAIN does not have.
  local x='|' metadata pair
  while [[ "${TRAIN:-}" == *"$x"* ]]; do x+='|'; done
  metadata="^$x^bucket=$BUCKET"
  for pair in "name=$NAME" "repository=$REPOSITORY" "commit=$COMMIT" \
    "devices=$DEVICES" "train=${TRAIN:-}"; do
    metadata+="$x$pair"
  done
  queued create "--node-id=$NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$version" "${tier[@]}" --scopes=cloud-platform \
    "--metadata-from-file=startup-script=$here/startup.sh" \
    "--metadata=$metadata"
}

state() {
  queued describe '--format=value(state.state)'
}

delete() {
  queued delete --force --quiet
}

done_marker() {
  run gcloud storage ls "$BUCKET/done/$NAME"
}

# A spot TPU that was taken away does not come back; a new one continues.
watch() {
  [[ -n "${TRAIN:-}" ]] || fail 'watch needs TRAIN: what is to be done.'
  if $dry_run; then
    done_marker
    state
    delete
    create
    return
  fi
  local now
  until done_marker > /dev/null 2>&1; do
    now=$(state 2> /dev/null || echo NONE)
    echo "$(date '+%F %T') $NAME: $now"
    case "$now" in
      NONE) create ;;
      FAILED | SUSPENDED) delete && create ;;
    esac
    sleep "${WATCH_S:-60}"
  done
  echo "$NAME has done its work."
  delete
}

on_hosts() {
  local worker=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    "--worker=$worker" \
    "--command=cd /opt/gqa_t5x && source .venv/bin/activate && $*"
}

# A host that is missing would hang all others in their first step.
check() {
  require DEVICES
  on_hosts all "timeout 300 python launch/check_devices.py $DEVICES"
}

benchmark() {
  local trace="$BUCKET/traces/$NAME"
  on_hosts 0 "python launch/trace.py $trace $(printf '%q ' decode "$@")"
  echo "# tensorboard --logdir=$trace   (pip install tensorboard-plugin-profile)"
}

jobset() {
  require REPOSITORY COMMIT TRAIN GKE_ACCELERATOR GKE_TOPOLOGY GKE_HOSTS GKE_CHIPS_A_HOST
  local name text
  text=$(< "$here/jobset.yaml")
  for name in NAME REPOSITORY COMMIT GKE_ACCELERATOR GKE_TOPOLOGY GKE_HOSTS \
    GKE_CHIPS_A_HOST; do
    text=${text//"{$name}"/"${!name}"}
  done
  # Its lines go into a block of YAML, each as far in as the first.
  text=${text//"{TRAIN}"/"${TRAIN//$'\n'/$'\n                  '}"}
  printf '%s\n' "$text"
}

main() {
  if [[ "${1:-}" == --dry_run ]]; then
    dry_run=true
    shift
  fi
  local command=${1:-} file=${ENV_FILE:-$here/env.sh}
  case "$command" in
    '' | -h | --help | help)
      usage
      return
      ;;
    create | watch | status | check | run | benchmark | logs | delete | jobset) shift ;;
    *) fail "$command is no command; see launch/tpu.sh --help." ;;
  esac
  # shellcheck disable=SC1090,SC1091
  if [[ -f "$file" ]]; then source "$file"; fi
  require PROJECT ZONE NAME ACCELERATOR_TYPE PROVISIONING BUCKET
  [[ "$BUCKET" == gs://* ]] || fail "BUCKET=$BUCKET is no bucket; write gs://NAME."
  case "$command" in
    run | benchmark) ;;
    logs) (($# < 2)) && [[ "${1:-0}" =~ ^[0-9]+$ ]] || fail "logs takes a host's number, not: $*" ;;
    *) (($# == 0)) || fail "$command takes nothing more, not: $* (--dry_run goes first)" ;;
  esac
  case "$command" in
    status) state ;;
    run)
      (($#)) || fail 'run what? Such as: launch/tpu.sh run python -m t5x.train ...'
      check
      on_hosts all "$(printf '%q ' "$@")"
      ;;
    logs) run gcloud storage cat "$BUCKET/logs/$NAME/worker-${1:-0}.log" ;;
    *) "$command" "$@" ;;
  esac
}

main "$@"
