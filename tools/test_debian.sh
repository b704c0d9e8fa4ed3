#!/bin/sh
# Run the tests on Pythons that this machine does not have: those of Debian testing, in a root of their own.  Its 3.13 is
# there for the sake of CPython's own tests, which change from one bugfix release to the next.
#
#     tools/test_debian.sh [VERSION ...] [-- pytest arguments]       VERSION: 3.13, 3.14, 3.15; all by default
#
# 3.14t, a free-threaded Python, is there by name only, as Debian has none: free_threaded/make.sh makes it in the root.
#
# The root stands in $IOCP_LOOP_DEBIAN, else in ~/.cache/iocp_loop-debian (about 1 GB).  Each step looks first whether
# its result is there.  It needs to be run by root on a Debian or Ubuntu machine with debootstrap; packages come from the
# machine's own Debian mirror, wheels by the pip of PYTHON (default: python3).  Where these cannot be had, it ends with 77.
#
# The tests get the settings IOCP_LOOP_NATIVE, IOCP_LOOP_DRIVER, IOCP_LOOP_STRESS and PYTHON_GIL.  IOCP_LOOP_REPEAT=100 runs them
# so many times in a row, until one fails.  IOCP_LOOP_TSAN=1, for 3.14t: the native part is built with ThreadSanitizer, see
# free_threaded/tsan/tsan.h.  IOCP_LOOP_BENCH=1: the arguments are those of `python -m benchmarks` instead, which is run beside
# the other loops that have a wheel for that Python; what it measured is in benchmarks/.results afterwards.
set -eu

project=$(cd "$(dirname "$0")/.." && pwd)
home=${IOCP_LOOP_DEBIAN:-${XDG_CACHE_HOME:-$HOME/.cache}/iocp_loop-debian}
root=$home/root
python=${PYTHON:-python3}
all="3.13 3.14 3.15"

say() { echo "test_debian: $*" >&2; }
fail() { say "$*"; exit 1; }
lack() { say "$*"; exit 77; }

versions=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case " $all 3.14t " in *" $1 "*) versions="$versions $1" ;; *) fail "no version $1 here; there are: $all 3.14t" ;; esac
    shift
done
[ $# -eq 0 ] || shift
versions=${versions:-$all}

[ "$(id -u)" -eq 0 ] || fail "chroot wants root: run it with sudo"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
"$python" -c 'import tomllib, pip' 2>/dev/null || fail "$python lacks pip, or is older than 3.11: name another in PYTHON"

# ---------------------------------------------------------------------------------------------------------------------
# The root
# ---------------------------------------------------------------------------------------------------------------------

if [ ! -d "$root" ]; then
    mirror=$(apt-get indextargets --format '$(SITE)' 'Identifier: Packages' | grep -v security | head -n 1)
    [ -n "$mirror" ] || lack "apt knows no Debian mirror"
    packages=gcc,libc6-dev,libffi-dev,libssl-dev,openssl,ca-certificates,procps
    for version in $all; do
        packages=$packages,python$version-dev,python$version-venv,libpython$version-testsuite
    done
    say "making $root"
    rm -rf "$root.new"
    mkdir -p "$home"
    # An older debootstrap knows the script sid, and not the names of the releases that have come since.
    debootstrap --variant=minbase --include="$packages" testing "$root.new" "$mirror" sid >"$home/debootstrap.log" 2>&1 ||
        { tail -n 20 "$home/debootstrap.log" >&2; lack "debootstrap failed, see $home/debootstrap.log"; }
    mv "$root.new" "$root"
fi

# Where the Python of a version is in the root; and how pip is told of what pip would not guess.
place_of() {
    case $1 in *t) echo "/opt/python$1/bin/python$1" ;; *) echo "/usr/bin/python$1" ;; esac
}
abi_of() {
    case $1 in *t) echo "--abi cp$(echo "$1" | tr -d .) --abi none" ;; esac
}

here=$project/tools/free_threaded
for version in $versions; do
    [ -x "$root/usr/bin/python${version%t}" ] || lack "no Python ${version%t} in $root, which is older: remove it"
    made=$root/opt/python$version
    if [ ! -x "$root$(place_of "$version")" ] || { [ -d "$made" ] &&
        ! { cmp -s "$here/make.sh" "$made/make.sh" && cmp -s "$here/launch.c" "$made/launch.c"; }; }; then
        say "making Python $version"
        "$python" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary :all: \
            --python-version "${version%t}" --implementation cp $(abi_of "$version") \
            --platform "manylinux2014_$(uname -m)" --dest "$home/interpreter" panda3d==1.10.16 ||
            lack "the interpreter of Python $version cannot be downloaded"
        "$here/make.sh" "$root" "$home"/interpreter/panda3d-*.whl
    fi
done

# ---------------------------------------------------------------------------------------------------------------------
# Wheels, downloaded outside: pip inside has neither the certificates nor the settings of this machine
# ---------------------------------------------------------------------------------------------------------------------

"$python" - "$project/pyproject.toml" >"$home/requirements.txt" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
extras = project["optional-dependencies"]
print(*settings["build-system"]["requires"], *project["dependencies"], *extras["test"], *extras["bench"], sep="\n")
END
machine=$(uname -m)
download() { # VERSION, then what pip download takes
    version=$1
    shift
    "$python" -m pip --disable-pip-version-check --quiet download --only-binary :all: --python-version "${version%t}" \
        --implementation cp $(abi_of "$version") --platform "manylinux2014_$machine" --platform "manylinux_2_28_$machine" \
        --platform "manylinux_2_34_$machine" --platform "manylinux_2_36_$machine" --platform "manylinux_2_39_$machine" "$@"
}
for version in $versions; do
    wheels=$root/wheels/$version
    if ! cmp -s "$home/requirements.txt" "$wheels/requirements.txt"; then
        say "downloading wheels for Python $version"
        rm -rf "$wheels"
        download "$version" --dest "$wheels" --requirement "$home/requirements.txt" ||
            lack "the wheels for Python $version cannot be downloaded"
        cp "$home/requirements.txt" "$wheels/"
    fi
    [ -n "${IOCP_LOOP_BENCH-}" ] || continue
    for peer in rsloop zuvloop blazio talyn rloop aiofastnet httptools; do
        download "$version" --dest "$wheels/peers" "$peer" 2>/dev/null || say "Python $version has no wheel of $peer"
    done
done

# ---------------------------------------------------------------------------------------------------------------------
# The project as it stands, and the tests
# ---------------------------------------------------------------------------------------------------------------------

rm -rf "$root/project"
mkdir "$root/project"
(cd "$project" && git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cf - -T -) |
    tar -xf - -C "$root/project"

cat >"$root/run-tests" <<'END'
#!/bin/sh
set -eu
version=$1
python=$2
shift 2
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels/$version PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ -x "/venv-$version/bin/pip" ] || "$python" -m venv --clear "/venv-$version"
"/venv-$version/bin/pip" install --quiet --editable '/project[test]'
cd /project
if [ -n "${IOCP_LOOP_BENCH-}" ]; then
    "/venv-$version/bin/pip" install --quiet --editable '/project[bench]' "/wheels/$version/peers"/*.whl
    exec "/venv-$version/bin/python" -m benchmarks "$@"
fi
"/venv-$version/bin/python" -W error -c 'import iocp_loop'
"/venv-$version/bin/python" -m iocp_loop
if [ -n "${IOCP_LOOP_TSAN-}" ]; then
    rm -rf /tsan
    cp -r /project /tsan
    cd /tsan
    "/venv-$version/bin/pip" install --quiet setuptools
    rm -rf build iocp_loop/*.so
    here=/tsan/tools/free_threaded/tsan
    CFLAGS="-g -O1 -fsanitize=thread -w -include $here/tsan.h" LDFLAGS=-fsanitize=thread \
        "/venv-$version/bin/python" setup.py --quiet build_ext --inplace
    export LAUNCH_PRELOAD="$(gcc -print-file-name=libtsan.so)" PYTHONPATH="/tsan:$here" IOCP_LOOP_NATIVE=1
    export TSAN_OPTIONS="suppressions=$here/suppressions history_size=4 die_after_fork=0 detect_deadlocks=0"
fi
for round in $(seq "${IOCP_LOOP_REPEAT:-1}"); do
    [ "$round" = 1 ] || echo "round $round of $IOCP_LOOP_REPEAT"
    "/venv-$version/bin/python" -m pytest "$@"
done
END
chmod +x "$root/run-tests"

export settings=
for name in IOCP_LOOP_NATIVE IOCP_LOOP_DRIVER IOCP_LOOP_STRESS IOCP_LOOP_REPEAT IOCP_LOOP_TSAN IOCP_LOOP_BENCH \
    PYTHON_GIL; do
    eval "value=\${$name-}"
    [ -z "$value" ] || settings="$settings $name=$value"
done

# In a mount namespace: what is mounted for the root goes when the tests end, however they end.
status=0
for version in $versions; do
    say "Python $version"
    unshare --mount sh -c '
        mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && root=$1 && shift &&
        exec chroot "$root" /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/bin:/bin:/usr/sbin:/sbin $settings /run-tests "$@"
    ' sh "$root" "$version" "$(place_of "$version")" "$@" || { status=$?; say "Python $version: the tests failed"; }
done
if [ -n "${IOCP_LOOP_BENCH-}" ]; then
    mkdir -p "$project/benchmarks/.results"
    cp "$root/project/benchmarks/.results"/* "$project/benchmarks/.results/" || status=1
fi
exit "$status"
