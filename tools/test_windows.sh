#!/bin/sh
# Run the tests on Windows CPython under Wine:  tools/test_windows.sh [VERSION|auto] [pytest arguments]
# Makes what it needs on a Debian or Ubuntu machine; see windows_python.py beside it for what and where.
# PYTHON names the Python (3.11 or newer) that runs the tool.
set -eu
exec "${PYTHON:-python3}" -B "$(dirname "$0")/test_windows.py" "$@"
