#!/bin/bash
# The tests and the fuzzers on a native part that is built with AddressSanitizer and UndefinedBehaviorSanitizer, the tests under
# valgrind, and those with threads under ThreadSanitizer, on a free-threaded Python (as root, or they are skipped).
#
#   tools/sanitize.sh [asan] [valgrind] [tsan] [-- ARGUMENTS OF PYTEST]     (none named: all)
#
# It works on a copy of the project in build/sanitize, so that the modules of the environment stay as they are.
# PYTHON names the interpreter of an environment with what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
copy=build/sanitize

# What has to do with the native part.  Of the rest, the subprocesses of other programs and long random runs add nothing
# but time.
subjects=(
    tests/test_native_tier.py tests/test_interpreters.py tests/test_handles.py tests/test_turns.py tests/test_readers.py
    tests/test_native_uring.py tests/test_uring_refused.py tests/test_socket_waits.py tests/test_loop_forks.py
    tests/test_bulk_receive.py tests/test_drivers*.py tests/test_transports*.py tests/test_sockets.py
    tests/test_datagrams.py tests/test_loop.py tests/test_start_tls.py tests/test_tls.py tests/test_debug_mode.py
    tests/test_contexts.py tests/test_servers.py tests/test_port.py
    tests/test_proactor.py tests/test_poll.py tests/test_readiness.py tests/test_guarantees.py
    tests/test_connections.py tests/test_embedding.py tests/test_unix.py tests/test_gc_stress.py tests/test_lent_memory.py
    tests/cpython
)
# Programs of the fuzzers: seeds of each family.
seeds=5
# Loops and ports that several threads use at once.
threaded=(tests/test_threads_in_parallel.py tests/test_run_threads.py tests/test_port.py tests/test_echo_traffic.py)
# Under valgrind everything takes some 30 times as long.  It lets no other thread run while one is in io_uring_enter, so
# what sends from a thread is only for driver poll.
without_threads=(
    tests/test_native_tier.py tests/test_interpreters.py tests/test_handles.py tests/test_turns.py tests/test_socket_waits.py
)
fewer=("${without_threads[@]}" tests/test_bulk_receive.py tests/test_datagrams.py)
# These count on time, or make so many things that they would take hours.
too_slow='not chain and not strike and not memory and not slow and not many and not timeout'

tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    tools+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(asan valgrind tsan)

# build FLAGS COMMAND...: the package, with its modules built with these flags of the compiler, and the tests beside it;
# then the doctor, by COMMAND.
build() {
    rm -rf "$copy"
    mkdir -p "$copy/source"
    cp -r iocp_loop setup.py pyproject.toml README.md LICENSE MANIFEST.in "$copy/source"
    rm -f "$copy"/source/iocp_loop/*.so
    CFLAGS="$1" LDFLAGS="$1" "$python" -m pip --disable-pip-version-check --quiet install --no-deps \
        --target "$copy" "$copy/source"
    cp -r tests docs pyproject.toml "$copy"
    (cd "$copy" && IOCP_LOOP_NATIVE=1 "${@:2}" "$python" -m iocp_loop)
}

run_asan() {
    local library flags=-g\ -O1\ -fno-omit-frame-pointer\ -fsanitize=address,undefined,float-cast-overflow
    library=$("${CC:-gcc}" -print-file-name=libasan.so)
    # Leaks are not looked for here: CPython keeps much to its end.  tests/test_references.py does that.
    local settings=(
        "LD_PRELOAD=$library" PYTHONMALLOC=malloc IOCP_LOOP_NATIVE=1
        ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
        UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1
    )
    build "$flags -fno-sanitize-recover=all" env "${settings[@]}"
    (cd "$copy" && env "${settings[@]}" "$python" -m pytest -q -p no:cacheprovider "${subjects[@]}" "$@")
    (cd "$copy" && env "${settings[@]}" "$python" -m tests.fuzz --loops uring,poll --tier native --count "$seeds" --limit 180)
}

under_valgrind() {
    (cd "$copy" && env PYTHONMALLOC=malloc IOCP_LOOP_NATIVE=1 valgrind --quiet --error-exitcode=99 --leak-check=no \
        --suppressions="$OLDPWD/tools/valgrind.supp" \
        "$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=0 -k "$too_slow" "$@")
}

run_valgrind() {
    build "-g -O1" env
    under_valgrind --driver uring "${without_threads[@]}" "$@"
    under_valgrind --driver poll "${fewer[@]}" "$@"
}

# In the root of test_free_threaded.sh.  -s: a report comes on the standard error, beside the test that it belongs to; the
# run fails for it in the end.
run_tsan() {
    IOCP_LOOP_TSAN=1 IOCP_LOOP_STRESS="${IOCP_LOOP_STRESS:-5}" PYTHON=$python tools/test_free_threaded.sh \
        -q -s -p no:cacheprovider "${threaded[@]}" "$@"
}

for tool in "${tools[@]}"; do
    printf '=== %s ===\n' "$tool"
    begin=$SECONDS
    "run_$tool" "$@"
    printf -- '--- %s: clean, %d s\n' "$tool" $((SECONDS - begin))
done
