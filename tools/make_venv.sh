#!/bin/sh
# Make a virtual environment with a Python of 3.11 or newer.  Does nothing where a usable one stands already.
#
#     tools/make_venv.sh DIRECTORY [PYTHON]
#
# Without PYTHON the first suitable one on PATH is taken: python3, then python3.15 down to python3.11.
set -eu

venv=$1
python=${2-}

say() { echo "make_venv: $*" >&2; }

suitable() {
    # A name on PATH may be a stub that refuses to run; only running it tells.
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -x "$venv/bin/python" ] && suitable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1
then
    exit 0
fi

if [ -n "$python" ]; then
    suitable "$python" || { say "$python is not there, or is older than Python 3.11"; exit 1; }
else
    for name in python3 python3.15 python3.14 python3.13 python3.12 python3.11; do
        if suitable "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || {
        say "no Python 3.11 or newer on PATH; name one with: make PYTHON=/path/to/python3 ..."
        exit 1
    }
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
say "$venv: Python $version ($python)"

if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
    exit 0
fi

# Debian and Ubuntu keep pip for new environments in a package of its own.  It is only a wheel: it can be fetched and
# unpacked without being root, and without changing the system.
say "this Python has no ensurepip (package python3-venv); taking pip from package python3-pip-whl"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fetch_pip() {
    (cd "$scratch" && apt-get download -qq python3-pip-whl >/dev/null 2>&1 && dpkg -x ./*.deb .)
}

# An image without package lists needs them first; only root may fetch those.
if "$python" -m venv --clear --without-pip "$venv" >/dev/null 2>&1 &&
    { fetch_pip || { [ "$(id -u)" -eq 0 ] && apt-get update -qq && fetch_pip; }; }
then
    for wheel in "$scratch"/usr/share/python-wheels/pip-*.whl; do
        "$venv/bin/python" "$wheel/pip" install --quiet --no-index "$wheel" && exit 0
    done
fi
rm -rf "$venv"
say "cannot make a virtual environment.  Install what is missing and run make again:"
say "    sudo apt-get update && sudo apt-get install python3-venv"
exit 1
