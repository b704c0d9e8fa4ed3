#!/bin/sh
# Run the tests on Windows Python under a newer Wine than this machine's: that of a later Debian, in a root of its own.
#
#     tools/test_newer_wine.sh [VERSION|auto] [pytest arguments]      as tools/test_windows.sh
#
# It differs where the tests care: a send without blocking takes everything at once, as on Windows.  The root (2.1 GB) and
# a Windows Python of its own stand in $IOCP_LOOP_NEWER_WINE, else in ~/.cache/iocp_loop-newer-wine.  Each step looks
# first whether its result is there.  It wants root, debootstrap, and the machine's own Debian mirror; where these are
# missing it says so, and that is no failure.
set -eu

project=$(cd "$(dirname "$0")/.." && pwd)
home=${IOCP_LOOP_NEWER_WINE:-${XDG_CACHE_HOME:-$HOME/.cache}/iocp_loop-newer-wine}
suite=trixie
root=$home/root

say() { echo "test_newer_wine: $*" >&2; }
leave_out() { say "left out: $*"; exit 0; }

[ "$(id -u)" -eq 0 ] || leave_out "chroot wants root"
unshare --mount true 2>/dev/null || leave_out "mounts of its own are not allowed here"

if [ ! -d "$root" ]; then
    command -v debootstrap >/dev/null || apt-get -qq -y install debootstrap >/dev/null 2>&1 ||
        leave_out "debootstrap is missing, and can't be installed"
    mirror=$(apt-get indextargets --format '$(SITE)' 'Identifier: Packages' | grep '/debian$' | head -n 1)
    [ -n "$mirror" ] || leave_out "apt knows no Debian mirror"
    say "making $root (2.1 GB)"
    rm -rf "$root.new"
    mkdir -p "$home"
    # An older debootstrap knows the script sid, and not the names of the releases that have come since.
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root.new" "$mirror" sid >"$home/debootstrap.log" 2>&1 ||
        leave_out "debootstrap failed, see $home/debootstrap.log"
    cp /etc/resolv.conf /etc/hosts /etc/services /etc/protocols "$root.new/etc/" # without hosts Wine knows no localhost
    for settings in /etc/apt/apt.conf.d/*; do # the way to the mirror
        [ -e "$root.new$settings" ] || cp "$settings" "$root.new$settings"
    done
    unshare --mount sh -ec '
        mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev"
        chroot "$0" apt-get -qq update
        chroot "$0" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends wine64
    ' "$root.new" >>"$home/debootstrap.log" 2>&1 || leave_out "Wine could not be installed, see $home/debootstrap.log"
    mv "$root.new" "$root"
fi

# Programs by the names that tools/windows_python.py looks for, each of which is the one in the root.
rm -rf "$home/bin"
mkdir -p "$home/bin" "$home/windows" "$root$home/windows"
for name in wine64 wineserver; do
    for path in /usr/bin/$name /usr/bin/${name}64 /usr/lib/wine/$name /usr/lib/wine/${name}64; do
        [ -e "$root$path" ] || [ -L "$root$path" ] || continue
        cat >"$home/bin/$name" <<END
#!/bin/sh
exec chroot "$root" /bin/sh -c 'cd "\$0" 2>/dev/null || cd /; exec "\$@"' "\$PWD" $path "\$@"
END
        chmod +x "$home/bin/$name"
        break
    done
    [ -x "$home/bin/$name" ] || { say "no $name in $root"; exit 1; }
done
ln -s wineserver "$home/bin/wineserver64"

# In a mount namespace: what is mounted for the root goes when the tests end, however they end.
export IOCP_LOOP_WINDOWS="$home/windows" PATH="$home/bin:$PATH"
exec unshare --mount sh -ec '
    root=$1 home=$2 run=$3 && shift 3
    mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" && mount --bind "$home/windows" "$root$home/windows"
    exec "$run" "$@"
' sh "$root" "$home" "$project/tools/test_windows.sh" "$@"
