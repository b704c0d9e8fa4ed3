#!/bin/sh
# Make a free-threaded CPython 3.14 in a root that has Debian's Python 3.14: /opt/python3.14t.  Debian has none.
#
#     tools/free_threaded/make.sh ROOT WHEEL
#
# The interpreter and its extension modules are those that the wheel of panda3d for cp314t brings, which makes programs of
# Python scripts (deploy-stub, a CPython to run them in); the library and the headers are Debian's.  launch.c tells how the
# program becomes an interpreter again.
set -eu

root=$1
wheel=$2
here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/python3.14t

rm -rf "$root$prefix"
mkdir -p "$root$prefix/bin" "$root$prefix/include" "$root$prefix/wheel"
cp "$wheel" "$root$prefix/wheel/"
cp "$here/launch.c" "$here/make.sh" "$root$prefix/"
cat >"$root$prefix/bin/python3.14t" <<END2
#!/bin/sh
# A virtual environment tells by its pyvenv.cfg where its Python is at home.
[ -e "\${0%/*}/../pyvenv.cfg" ] || export LAUNCH_HOME=$prefix
LAUNCH_AS=\$0 LD_PRELOAD=\${LAUNCH_PRELOAD:+\$LAUNCH_PRELOAD:}\${LD_PRELOAD:+\$LD_PRELOAD:}$prefix/launch.so exec $prefix/deploy-stub "\$@"
END2
chmod +x "$root$prefix/bin/python3.14t"
ln -s python3.14t "$root$prefix/bin/python3"

chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin sh -eu -c '
    prefix=$1
    cp -r /usr/lib/python3.14 "$prefix/lib"
    mkdir "$prefix/lib.new"
    mv "$prefix/lib" "$prefix/lib.new/python3.14t"
    mv "$prefix/lib.new" "$prefix/lib"
    library=$prefix/lib/python3.14t
    rm -rf "$library"/lib-dynload/* "$library"/_sysconfigdata_* "$library/EXTERNALLY-MANAGED"
    python3.14 - "$prefix" "$library" <<END3
import pathlib, re, sys, zipfile
prefix, library = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(next((prefix / "wheel").iterdir())) as wheel:
    for name in wheel.namelist():
        folder, _, file = name.rpartition("/")
        if file == "deploy-stub":
            target = prefix / file
        elif folder == "deploy_libs" and file.startswith("_sysconfigdata"):
            target = library / file
        elif folder == "deploy_libs" and ".so" in file:  # modules and what they need look for each other in one folder
            target = library / "lib-dynload" / file
        else:
            continue
        content = wheel.read(name)
        if target.suffix == ".py":
            content = re.sub(rb"/opt/_internal/[^/\x27\x22 ]*", str(prefix).encode(), content)
            content += b"build_time_vars[\x27WHEEL_PKG_DIR\x27] = \x27/usr/share/python-wheels\x27\n"  # where Debian has its pip
        target.write_bytes(content)
        target.chmod(0o755)
END3
    cp -r /usr/include/python3.14 "$prefix/include/python3.14t"
    # The header there leads to the one of the machine'"'"'s kind.
    cp /usr/include/*/python3.14/pyconfig.h "$prefix/include/python3.14t/pyconfig.h"
    sed -i "/Py_GIL_DISABLED/d" "$prefix/include/python3.14t/pyconfig.h"
    echo "#define Py_GIL_DISABLED 1" >>"$prefix/include/python3.14t/pyconfig.h"
    gcc -O1 -Wall -I"$prefix/include/python3.14t" -shared -fPIC -o "$prefix/launch.so" "$prefix/launch.c" -ldl
' make "$prefix"
