#!/usr/bin/env bash
# What each host of a TPU does when it starts: install the pinned packages, check that all
# devices are there, and run TRAIN until it succeeds. After a restart it runs again, and
# training goes on. launch/tpu.sh create sends it, with settings as metadata.
set -euo pipefail

FOLDER=/opt/gqa_t5x
LOG=/var/log/gqa_t5x.log
QUICK_S=${QUICK_S:-120}  # a run that fails sooner than this has not trained
LIMIT=${LIMIT:-5}        # give up after so many of these in a row
PAUSE_S=${PAUSE_S:-10}   # before the next run; doubled after each

attribute() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

say() {
  echo "$(date '+%F %T') $*"
}

install() {
  if ! command -v python3.11 > /dev/null; then
    add-apt-repository --yes ppa:deadsnakes/ppa
    apt-get update
    apt-get install --yes python3.11 python3.11-venv git make
  fi
  if [[ ! -d "$FOLDER/.git" ]]; then
    git clone "$(attribute repository)" "$FOLDER"
  fi
  cd "$FOLDER"
  git fetch
  git checkout --force "$(attribute commit)"
  make setup ENGINE=t5x PYTHON=python3.11
  .venv/bin/pip install --quiet --constraint constraints.txt 'jax[tpu]'
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

# Runs a command and passes SIGTERM on to it and to what it started, so that training
# saves before the host goes.
as_child() {
  set -m # The child leads a process group of its own.
  "$@" &
  set +m
  local child=$! code=0
  trap 'kill -TERM -- "-$child" 2> /dev/null' TERM
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do # The trap ended the first wait, not the child.
    code=0
    wait "$child" || code=$?
  done
  trap - TERM
  return "$code"
}

# Runs TRAIN as a shell does: lines, pipes, variables. The first command that fails ends
# it; on SIGTERM, the one that is at work ends, and none follows.
train() {
  as_child bash -e -o pipefail -c $'trap "exit 143" TERM\n'"$1"
}

# Runs a command until it succeeds. It also fails when another host does, and is then run
# again; a command that fails at once many times in a row is given up.
until_done() {
  local quick=0 start
  while true; do
    start=$SECONDS
    if "$@"; then return 0; fi
    if ((SECONDS - start < QUICK_S)); then quick=$((quick + 1)); else quick=0; fi
    if ((quick >= LIMIT)); then
      say "given up after $quick quick failures in a row: $*"
      return 1
    fi
    say "ended badly; again in $((PAUSE_S << quick)) s"
    sleep "$((PAUSE_S << quick))"
  done
}

copy_log() {
  gcloud storage cp --quiet "$LOG" \
    "$(attribute bucket)/logs/$(attribute name)/worker-$(attribute agent-worker-number).log"
}

main() {
  exec >> "$LOG" 2>&1
  (while sleep 30; do copy_log || true; done) &
  # shellcheck disable=SC2064  # $! is known now
  trap "kill $! || true; copy_log" EXIT
  install
  until_done as_child python launch/check_devices.py "$(attribute devices)"
  local commands
  commands=$(attribute train)
  [[ -n "$commands" ]] || return 0
  until_done train "$commands"
  say 'training is done'
  if [[ "$(attribute agent-worker-number)" == 0 ]]; then
    date | gcloud storage cp - "$(attribute bucket)/done/$(attribute name)"
  fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main; fi
