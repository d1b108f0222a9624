#!/bin/bash
# A real Windows CPython under Wine: DEST/python/python.exe and DEST/prefix.
#   setup.sh DEST PYTHON
# PYTHON is a Linux CPython of the same minor version: it gives the standard library. The DLLs come out of a package that
# carries a Windows Python (panda3d); the console program is mkpe.py's. Wine must be installed.
set -euo pipefail
dest=$1 python=$2 here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tag=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
export WINEPREFIX=$dest/prefix WINEDEBUG=-all WINEDLLOVERRIDES='mscoree,mshtml='
unset DISPLAY
rm -rf "$dest"
mkdir -p "$dest/python/DLLs" "$dest/python/Lib" "$dest/wheel"

"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --platform win_amd64 \
  --implementation cp --python-version "3.${tag#3}" -d "$dest/wheel" panda3d==1.10.16
"$python" - "$dest"/wheel/*.whl "$dest/python" <<'PY'
import sys, zipfile
from pathlib import Path

wheel, dest = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
for name in wheel.namelist():
    file = Path(name).name
    low = file.lower()
    if not name.startswith("deploy_libs/") or low.startswith(("api-ms", "tcl", "tk", "_tkinter")) or "t-win_" in low:
        continue
    beside_exe = low.endswith(".dll") and low.startswith(("python3", "vcruntime"))
    (dest / ("" if beside_exe else "DLLs") / file).write_bytes(wheel.read(name))
PY
rm -rf "$dest/wheel"
stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
tar -C "$stdlib" -cf - --exclude=./test --exclude=./site-packages --exclude=./dist-packages --exclude=./lib-dynload \
  --exclude='./config-*' --exclude=./idlelib --exclude=./tkinter --exclude=./ensurepip --exclude='*.opt-?.pyc' . |
  tar -C "$dest/python/Lib" -xf -
"$python" "$here/mkpe.py" "$dest/python/python.exe" "python$tag.dll"

# The first Wine process starts services that inherit its streams, so each gets /dev/null; pipes hang, a file is refused.
wine wineboot -i </dev/null >/dev/null 2>&1
wine reg add 'HKCU\Software\Wine' /v Version /d win10 /f </dev/null >/dev/null 2>&1
wine "$dest/python/python.exe" -c 'import asyncio, ctypes, ssl, sqlite3, sys; print(sys.version)' </dev/null 2>&1 | cat
test "${PIPESTATUS[0]}" = 0
wineserver -k || true
wineserver -w
sockets=$(cat "$WINEPREFIX/wineserver" 2>/dev/null) || true # Debian's Wine notes there a folder that it made in /tmp
case $sockets in wine-*) rm -rf "/tmp/$sockets" ;; esac
touch "$dest/.complete"
