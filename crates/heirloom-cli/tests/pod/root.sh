# Makes the root directory of a pod, in a mount namespace of its own, and runs the pod's program in it:
#
#     sh root.sh MOUNTPOINT PROGRAM SHARED OWNER IDMAPPED OWN HOST_UID UID COMMAND...
#
# Everything is read-only but /shared, and /pod, which is the directory OWN if there is one. There is nothing but what the programs need to be loaded, and /proc. What is OWNER's
# in SHARED is the pod's own user's in /shared, if IDMAPPED is the program that can do that.
set -eu
root=$1 program=$2 shared=$3 owner=$4 idmapped=$5 own=$6 host_uid=$7 uid=$8
shift 8

mount -t tmpfs -o mode=755 tmpfs "$root"
for directory in usr bin sbin lib lib32 lib64; do
    if [ -L "/$directory" ]; then
        cp -P "/$directory" "$root/$directory"
    elif [ -d "/$directory" ]; then
        mkdir "$root/$directory"
        mount --bind "/$directory" "$root/$directory"
        mount -o remount,bind,ro "$root/$directory"
    fi
done
touch "$root/program"
mount --bind "$program" "$root/program"
mount -o remount,bind,ro "$root/program"
mkdir "$root/proc" "$root/shared"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
if [ -n "$idmapped" ]; then
    mount -t proc proc /proc
    "$idmapped" "$shared" "$root/shared" "$owner" "$host_uid"
else
    mount --bind "$shared" "$root/shared"
fi
mount -o remount,bind,nosuid,nodev,noexec "$root/shared"
if [ -n "$own" ]; then
    mkdir "$root/pod"
    mount --bind "$own" "$root/pod"
    mount -o remount,bind,nosuid,nodev,noexec "$root/pod"
fi
mount -o remount,ro "$root"
cd "$root"
pivot_root . .
umount -l .

# Its user is not root outside, and has no privilege inside, but to be root there if that is its number. It ends with whoever
# started the pod.
exec setpriv --reuid="$host_uid" --regid="$host_uid" --clear-groups \
    unshare --user --map-user="$uid" --map-group="$uid" \
    setpriv --no-new-privs --pdeathsig=KILL "$@"
