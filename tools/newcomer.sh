#!/bin/sh
# A newcomer's path, with a stopwatch: a fresh environment, this package, FastAPI and uvicorn, and an application that
# answers on this loop.
#
#   tools/newcomer.sh [WHEEL]      (without it: built from here, as pip does it from the source distribution)
#
# PYTHON names the Python (3.11 or newer).  Exit status 0 if it took less than three minutes.
set -eu
cd "$(dirname "$0")/.."

what=${1:-.}
folder=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || :
    rm -rf "$folder"
}
trap finish EXIT
begin=$(date +%s)

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet "$what" fastapi uvicorn
cat >"$folder/app.py" <<'PROGRAM'
import asyncio

from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def loop() -> dict[str, str]:
    return {"loop": str(asyncio.get_running_loop())}
PROGRAM
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/uvicorn" --app-dir "$folder" app:app --port "$port" --loop iocp_loop:new_event_loop --log-level warning &
server=$!

answer=
for _ in $(seq 100); do
    answer=$("$folder/venv/bin/python" -c '
import sys, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1], timeout=5).read().decode())' "$port" 2>/dev/null) && break
    sleep 0.1
done
seconds=$(($(date +%s) - begin))
echo "$answer after $seconds s"
case $answer in
*IocpEventLoop*) [ "$seconds" -lt 180 ] ;;
*) exit 1 ;;
esac
