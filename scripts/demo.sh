#!/bin/bash
# From a checkout to tokens: two throw-away systemd machines, site.yml over SSH, a story through the queen.
# Without root it runs `rbee-ctl serve`: the same queen and worker as child processes on loopback.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n\033[1m==> %s\033[0m\n' "$*" >&2; }

if [ "$(id -u)" -ne 0 ] || ! command -v systemd-nspawn >/dev/null; then
  step "no root (or no systemd-nspawn): booting machines is out of reach, so queen and worker run here as child processes"
  exec rbee-ctl serve
fi

step "booting two machines (rbee-ctl lab up --nodes 2)"
rbee-ctl lab up --nodes 2

step "deploying the fleet over SSH (ansible-playbook -i .lab/inventory.yml site.yml)"
# Only what changes is shown: the first run says what it does, the second one nothing.
ANSIBLE_DISPLAY_OK_HOSTS=false ansible-playbook -i .lab/inventory.yml site.yml

step "asking the queen (rbee-ctl infer --model smollm2-135m-instruct --prompt 'Once upon a time')"
rbee-ctl infer --model smollm2-135m-instruct --prompt "Once upon a time" --max-tokens 120 --temperature 0.7
echo

step "try next"
cat >&2 <<'NEXT'
  . .venv/bin/activate
  rbee-ctl status
  rbee-ctl worker list
  eval "$(rbee-ctl env)"        # OPENAI_BASE_URL and OPENAI_API_KEY: any OpenAI client works now
  curl -N "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m-instruct", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}'
  rbee-ctl lab ssh lab1 systemctl status 'rbee-*'
  rbee-ctl lab down
NEXT
