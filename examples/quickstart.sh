#!/bin/bash
# From a bare Debian 12 or 13 to disk images as files. Installs rbdfs, starts a real single-node Ceph to try it on, imports
# a disk image, and copies it out of the mount with cp, dd and rsync. Prints each command before it runs it.
#
#   sudo ./examples/quickstart.sh                all of that; called again, it continues with what is there
#   sudo ./examples/quickstart.sh --devcluster   ... also on a host that has a Ceph cluster, which is not touched
#   sudo ./examples/quickstart.sh down           unmount, stop Ceph, remove everything except the packages and .venv
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # which su leaves out, and where mke2fs and losetup are

rbdfs=$PWD/.venv/bin/rbdfs
folder=/var/lib/rbdfs-quickstart # root's, and on disk
cluster=$folder/ceph
mountpoint=/mnt/rbdfs-quickstart
image=$mountpoint/rbd/vm1
started=false

step() {
    doing=$*
    printf '\n== %s\n' "$doing"
}

show() {
    echo "$ $*"
}

run() {
    show "$@"
    "$@"
}

die() {
    echo "quickstart.sh: $*" >&2
    exit 1
}

# ---- the steps

install_rbdfs() {
    step "Install rbdfs in .venv, and Debian's packages (the first time, this takes a minute or two)"
    run examples/install.sh "$@"
}

start_ceph() {
    step "Start a real Ceph in $cluster: a mon, a mgr and an OSD, on loopback"
    run "$rbdfs" devcluster up "$cluster" # if it fails, nothing of it runs, and its logs stay
    started=true
    unset CEPH_ARGS CEPH_KEYRING
    run export CEPH_CONF="$cluster/ceph.conf"
}

import_disk_image() {
    step "Import a disk image: a file system of 256 MiB with a file of 64 MiB"
    if rbd info rbd/vm1 >/dev/null 2>&1; then
        echo "rbd/vm1 is there already"
        return
    fi
    run mkdir -p "$folder/files"
    show "echo 'Hello from inside vm1' >$folder/files/hello.txt"
    echo 'Hello from inside vm1' >"$folder/files/hello.txt"
    run dd if=/dev/urandom of="$folder/files/random.bin" bs=1M count=64 status=none
    run mke2fs -q -t ext4 -d "$folder/files" "$folder/vm1.raw" 256M
    run rbd import --no-progress "$folder/vm1.raw" rbd/vm1
    run rm "$folder/vm1.raw"
}

mount_images() {
    step "Mount: every image is a file"
    if [[ -e $image ]]; then
        echo "$mountpoint is mounted already"
    else
        unmount "$mountpoint" # in case that its process is gone
        run mkdir -p "$mountpoint"
        run "$rbdfs" mount --allow-other "$mountpoint"
    fi
    run ls -lR "$mountpoint"
}

copy_out() {
    step "Copy the image with any tool"
    run rm -rf "$folder/copies"
    run mkdir "$folder/copies"
    run cp "$image" "$folder/copies/cp"
    run dd if="$image" of="$folder/copies/dd" bs=4M conv=sparse status=none
    run rsync --sparse "$image" "$folder/copies/rsync"
    run du --human-readable "$folder"/copies/*
}

compare() {
    step "Compare with what Ceph's own rbd export reads"
    local copy exported found
    show rbd export --no-progress rbd/vm1 - '|' sha256sum
    exported=$(rbd export --no-progress rbd/vm1 - | sha256sum)
    echo "$exported"
    for copy in cp dd rsync; do
        show sha256sum "<$folder/copies/$copy"
        found=$(sha256sum <"$folder/copies/$copy")
        echo "$found"
        [[ $found == "$exported" ]] || die "the copy made by $copy is not what rbd export reads"
    done
    echo "All the same."
    run rm -r "$folder/copies"
}

look_inside() {
    step "Read a file inside the image, without copying the image"
    if ! losetup --find >/dev/null 2>&1; then
        echo "Skipped: this machine has no loop devices."
        return
    fi
    run mkdir -p "$folder/inside"
    run mount -o loop,ro "$image" "$folder/inside"
    run ls -l "$folder/inside"
    run cat "$folder/inside/hello.txt"
    run cmp "$folder/inside/random.bin" "$folder/files/random.bin"
    run umount "$folder/inside"
}

say_how_to_go_on() {
    touch "$folder/worked"
    cat <<END

All of it worked. It goes on running; look around:
  ls -l $mountpoint/rbd
  cp $image /tmp/vm1.raw
  sudo rbd --conf $cluster/ceph.conf create --size 1G rbd/vm2      # a file more
Stop it, and remove what it made:
  sudo $PWD/examples/quickstart.sh down
END
}

say_how_to_mount() {
    cat <<END

rbdfs is installed. This host has a Ceph cluster, of which $1 tells. To see its images as files:
  sudo mkdir -p /mnt/rbd
  sudo $rbdfs mount --conf $1 /mnt/rbd      # as client.admin; --id NAME for another
  sudo ls -l /mnt/rbd
  sudo umount /mnt/rbd
To try rbdfs on a Ceph of its own instead:
  sudo $PWD/examples/quickstart.sh --devcluster
END
}

# ---- stopping

unmount() {
    local place=$1 how=("${@:2}")
    if findmnt --mountpoint "$place" >/dev/null; then
        run umount "${how[@]}" "$place"
    fi
}

take_down() {
    step "Unmount, stop Ceph, remove what was made"
    unmount "$folder/inside" "$@"
    unmount "$mountpoint" "$@"
    if [[ -d $mountpoint ]]; then run rmdir "$mountpoint"; fi
    if [[ -d $cluster ]]; then run "$rbdfs" devcluster down "$cluster"; fi
    run rm -rf "$folder"
}

# What an earlier call started stays; what this call did not finish is removed.
finish() {
    local status=$?
    if ((status != 0)); then
        printf '\nquickstart.sh: failed at: %s\n' "$doing" >&2
        unmount "$folder/inside" >&2
        if $started && [[ ! -e $folder/worked ]]; then take_down --lazy >&2; fi
    fi
    exit $status
}

configured=${CEPH_CONF:-$(compgen -G /etc/ceph/ceph.conf || true)}
case ${1:-} in
    down | "") ;;
    --devcluster) configured="" ;;
    *) die "what is $1? say nothing, --devcluster, or down" ;;
esac
((EUID == 0)) || die "run it with sudo: it installs packages, mounts, and keeps its data in $folder"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ ${1:-} == down ]]; then
    take_down
elif [[ -n $configured && $configured != "$cluster/ceph.conf" ]]; then
    install_rbdfs
    say_how_to_mount "$configured"
else
    install_rbdfs ceph-mon ceph-mgr ceph-osd ceph-common e2fsprogs mount rsync
    start_ceph
    import_disk_image
    mount_images
    copy_out
    compare
    look_inside
    say_how_to_go_on
fi
