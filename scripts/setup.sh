#!/bin/sh
# Prepare this checkout: Debian packages (as root), .venv with rbee and its tools, the llama.cpp wheel, the demo model.
# Safe to run again: what is there and unchanged is left alone, so a second run takes a second.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CACHE=${RBEE_CACHE:-$HOME/.cache/rbee}
say() { printf '%s\n' "setup: $*" >&2; }
die() { say "$1"; say "next: $2"; exit 1; }

# package | a file or command that shows it is there | what for
packages() {
  cat <<'LIST'
gcc|gcc|compiles llama.cpp once
g++|g++|compiles llama.cpp once
make|make|drives the builds
ccache|ccache|compiles llama.cpp a second time in seconds
python3-venv|@venv|the environment in .venv
openssh-client|ssh|the only way to a machine
iproute2|ip|network of the lab machines
systemd-container|systemd-nspawn|boots the lab machines
mmdebstrap|mmdebstrap|makes the lab's root file system
libgomp1|@libgomp|threads of llama.cpp
zsh|zsh|completion is tried in it
strace|strace|shows which programs rbee-ctl starts
fish|fish|completion is tried in it
LIST
}

present() {
  case "$1" in
    @venv) "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ;;
    @libgomp) ldconfig -p 2>/dev/null | grep -q libgomp.so.1 ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
  esac
}

PATH=$PATH:/usr/sbin:/sbin
missing= reasons=
for line in $(packages | tr ' ' '~'); do
  name=${line%%|*} rest=${line#*|}
  if ! present "${rest%%|*}"; then
    missing="$missing $name"
    reasons="$reasons
    $name: $(printf '%s' "${rest#*|}" | tr '~' ' ')"
  fi
done

if [ -n "$missing" ]; then
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "installing Debian packages:$reasons"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
  else
    say "missing Debian packages, not installed because this is not root:$reasons"
    case " $missing " in
      *" gcc "* | *" g++ "* | *" make "* | *" python3-venv "*) die "cannot go on without them" "sudo apt-get install$missing" ;;
    esac
    say "the lab needs them; 'make demo' will use rbee-ctl serve instead"
  fi
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "Python >= 3.11 needed, $PYTHON is $("$PYTHON" -V 2>&1)" "make setup PYTHON=/path/to/python3.11"

[ -x .venv/bin/python ] || { say "creating .venv"; "$PYTHON" -m venv .venv; }

wheel=$(.venv/bin/python roles/rbee_wheels/files/build_llama_wheel.py --cache "$CACHE")

stamp=$(cat pyproject.toml requirements/constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)-$wheel
if [ "$(cat .venv/rbee-setup 2>/dev/null)" != "$stamp" ]; then
  say "installing rbee and its tools into .venv (about a minute)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$wheel" -c requirements/constraints.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[dev]'
  printf '%s' "$stamp" > .venv/rbee-setup
fi

.venv/bin/python -m rbee_ctl.demo_model --cache "$CACHE" >/dev/null
say "ready: .venv, $(basename "$wheel"), demonstration model"
