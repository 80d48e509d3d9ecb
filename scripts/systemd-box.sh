#!/bin/sh
# Boots a real systemd as PID 1 of namespaces of its own, over this machine's files, runs a command beside it, and takes all of it
# down when the command ends. Whatever is written inside goes to memory. Needs root, util-linux, systemd and a cgroup2 mount.
#
#   systemd-box.sh [--root DIR] [--share DIR] [--pid-file FILE] [--private-network] [COMMAND ARGUMENT…]     (a shell by default)
#
# With --root it is the systemd, and the files, of another system that is installed in DIR, such as debootstrap(8) makes.
# DIR of --share is /share inside. FILE gets the PID of that systemd as this machine sees it, for nsenter(1). The network is
# this machine's unless --private-network is given. The exit code is the command's; 77: no systemd can be booted here.
set -eu

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }

boot() {
    root=/ share= pid_file= network=
    while [ $# -gt 0 ]; do
        case $1 in
            --root) root=$(realpath "$2"); shift 2 ;;
            --share) share=$(realpath "$2"); shift 2 ;;
            --pid-file) pid_file=$2; shift 2 ;;
            --private-network) network=--net; shift ;;
            --help) usage; exit 0 ;;
            --) shift; break ;;
            -*) usage >&2; exit 2 ;;
            *) break ;;
        esac
    done
    [ "$(id -u)" = 0 ] || unable "it takes root to make namespaces"
    for program in unshare nsenter setsid findmnt "$root/lib/systemd/systemd"; do
        command -v "$program" >/dev/null || unable "$program is not installed"
    done
    cgroup=$(findmnt -n -t cgroup2 -o TARGET | head -n 1)
    [ -n "$cgroup" ] || unable "no cgroup2 is mounted"

    state=$(mktemp -d /run/systemd-box.XXXXXX)
    cgroup=$cgroup/${state##*/}
    mkdir "$cgroup" "$state/layers" || unable "no cgroup can be made"
    box=
    trap take_down EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    # It joins the cgroup first, so that the namespace's root is there.
    # shellcheck disable=SC2086
    sh -c 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"' - "$cgroup" \
        setsid unshare --mount --uts --ipc --pid --cgroup $network --fork --kill-child --propagation private \
        sh "$0" _inside "$state" "$root" "$share" </dev/null >"$state/console" 2>&1 &
    box=$!
    wait_until_booted
    if [ -n "$pid_file" ]; then
        echo "$systemd" >"$pid_file.new"
        mv "$pid_file.new" "$pid_file"
    fi
    [ $# -gt 0 ] || set -- bash
    enter "$@"
}

unable() {
    echo "systemd-box: $1" >&2
    exit 77
}

enter() {
    nsenter --target "$systemd" --all --root --wd env -i HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8 SYSTEMD_PAGER=cat \
        SYSTEMD_COLORS=0 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

wait_until_booted() {
    # A loaded machine may take long; whatever fails ends the box.
    until systemd=$(tr -d ' ' <"/proc/$box/task/$box/children") && [ -n "$systemd" ] &&
        [ "$(cat "/proc/$systemd/comm")" = systemd ] &&
        case $(enter systemctl is-system-running 2>/dev/null) in running | degraded) true ;; *) false ;; esac; do
        kill -0 "$box" 2>/dev/null || {
            cat "$state/console" >&2
            unable "it did not boot"
        }
        sleep 0.02
    done
}

take_down() {
    # With PID 1 everything in its namespace ends.
    if [ -n "$box" ]; then
        kill -KILL "$box" 2>/dev/null || true
        wait "$box" 2>/dev/null || true
    fi
    until find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || [ ! -d "$cgroup" ]; do sleep 0.02; done
    rm -rf "$state"
}

# What runs in the new namespaces, as their first process: makes the root, and becomes systemd.
inside() {
    state=$1 system=$2 share=$3 layers=$1/layers
    mount -t tmpfs -o mode=755 box "$layers"
    mkdir "$layers/written" "$layers/work" "$layers/root"
    root=$layers/root
    mount -t overlay -o "lowerdir=$system,upperdir=$layers/written,workdir=$layers/work" box "$root"

    # Nothing of this machine's is started: neither what its administrator has enabled, nor what systemd has by default, but for
    # the journal and the bus.
    rm -rf "$root/etc/systemd/system" "$root/etc/fstab" "$root"/usr/lib/systemd/system/*.wants "$root"/etc/rc?.d
    rm -rf "$root/usr/lib/systemd/system-generators"
    mkdir -p "$root/etc/systemd/system/sysinit.target.wants" "$root/etc/systemd/system/sockets.target.wants"
    units=/usr/lib/systemd/system
    ln -s $units/systemd-journald.service "$root/etc/systemd/system/sysinit.target.wants/"
    for unit in systemd-journald.socket systemd-journald-dev-log.socket; do
        ln -s $units/$unit "$root/etc/systemd/system/sockets.target.wants/"
    done
    [ ! -e "$root$units/dbus.socket" ] || ln -s $units/dbus.socket "$root/etc/systemd/system/sockets.target.wants/"
    # journald is not to turn on this machine's auditing, nor to read its kernel's messages.
    ln -s /dev/null "$root/etc/systemd/system/systemd-journald-audit.socket"
    mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d"
    printf '[Journal]\nAudit=no\nReadKMsg=no\nStorage=volatile\nRateLimitBurst=0\n' >"$root/etc/systemd/journald.conf.d/box.conf"
    printf '[Manager]\nDefaultTimeoutStopSec=20s\n' >"$root/etc/systemd/system.conf.d/box.conf"

    mount -t tmpfs -o mode=755,nosuid,nodev run "$root/run"
    mount -t tmpfs -o mode=1777 tmp "$root/tmp"
    mount -t tmpfs -o mode=755 dev "$root/dev"
    mkdir "$root/dev/pts" "$root/dev/shm"
    for device in null zero full random urandom tty; do
        : >"$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    mount -t devpts -o newinstance,ptmxmode=0666 pts "$root/dev/pts"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    for number in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${number%:*}" "$root/dev/${number#*:}"; done
    mount -t proc proc "$root/proc"
    # This machine's kernel is not the box's to set up.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o ro sysfs "$root/sys" 2>/dev/null || mount --rbind -o ro /sys "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mkdir -p "$root/share"
    [ -z "$share" ] || mount --bind "$share" "$root/share"

    mkdir "$root/.outside"
    cd "$root"
    pivot_root . .outside
    cd /
    umount -l /.outside
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 container=box \
        /lib/systemd/systemd --system --unit=basic.target --show-status=no --log-target=journal
}

case ${1-} in
    _inside) shift; inside "$@" ;;
    *) boot "$@" ;;
esac
