#!/bin/sh
# Run the tests without the GIL, on a free-threaded CPython 3.14 in a root of its own; see test_debian.sh.
#
#     tools/test_free_threaded.sh [pytest arguments]
#
# Where it cannot be had, this says why and ends well.
set -eu

skip() { echo "test_free_threaded: skipped: $*" >&2; exit 0; }

[ "$(uname -sm)" = "Linux x86_64" ] || skip "there is an interpreter for Linux on x86_64 only"
[ "$(id -u)" -eq 0 ] || skip "chroot wants root"
command -v debootstrap >/dev/null || skip "debootstrap is missing"

status=0
"$(dirname "$0")/test_debian.sh" 3.14t -- "$@" || status=$?
[ "$status" -ne 77 ] || skip "see above"
exit "$status"
