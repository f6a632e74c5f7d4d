#!/bin/bash
# Take files out of a disk image without copying the image. Makes a read-only loop device of its file in an rbdfs mount,
# mounts the file system in it without replaying its journal, copies the files and prints their checksums.
# Undoes what it set up at the end, also after a failure.
#
#   sudo ./examples/restore-file.sh [OPTION...] IMAGE PATH... FOLDER
#
#   IMAGE           the image's file, best a snapshot's: /mnt/rbdfs/rbd/vm1@monday
#   PATH...         what to copy, as a path in the image's file system: /etc/fstab; a directory with everything in it
#   FOLDER          the target; made if it does not exist
#   --partition N   the file system is in this partition of the image
#   --snapshot      take a snapshot of IMAGE first, with the rbd command, and remove it at the end: the file system in an
#                   image that a VM is writing to is not consistent
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

partition=""
take_snapshot=false
spec=""
loop=""
folder=""

usage() {
    sed -n '2,/^set/ { /^#/ s/^# \{0,1\}//p }' "$0"
}

die() {
    echo "restore-file.sh: $*" >&2
    exit 1
}

finish() {
    local status=$?
    trap '' INT TERM HUP
    if [[ -n $folder ]]; then
        ! mountpoint --quiet "$folder" || umount "$folder" || status=1
        rmdir "$folder" || status=1
    fi
    if [[ -n $loop ]]; then losetup --detach "$loop" || status=1; fi
    if [[ -n $spec ]]; then rbd snap rm --no-progress "$spec" || status=1; fi
    exit $status
}

# The name of IMAGE for the rbd command, from the place of its file in the mount.
spec_of() {
    local mount
    mount=$(findmnt --noheadings --output TARGET --types fuse.rbdfs --target "$1") || die "$1 is not in an rbdfs mount"
    realpath --relative-to="$mount" "$1"
}

# The options that keep a mount from replaying the journal: the device cannot be written to.
mount_options() {
    case $1 in
        ext3 | ext4) echo ro,noload ;;
        xfs) echo ro,norecovery,nouuid ;;
        btrfs) echo ro,rescue=nologreplay ;;
        "") die "found no file system; if the image has partitions, say which one: --partition N
$(partx --show "$image" 2>/dev/null || true)" ;;
        *) echo ro ;;
    esac
}

while [[ ${1:-} == -* ]]; do
    case $1 in
        --partition) partition=${2:-}; shift ;;
        --snapshot) take_snapshot=true ;;
        -h | --help) usage; exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
    shift
done
(($# >= 3)) || die "say which image, which files, and where to; see --help"
image=$1
target=${*: -1}
paths=("${@:2:$#-2}")

((EUID == 0)) || die "run it with sudo: it makes a loop device and mounts it"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if $take_snapshot; then
    new=$(spec_of "$image")@restore-$(date +%Y%m%d-%H%M%S)-$$
    rbd snap create --no-progress "$new"
    spec=$new
    image=$image@${new##*@}
fi
[[ -f $image ]] || die "there is no file $image"

part=()
if [[ -n $partition ]]; then
    read -r start sectors < <(partx --noheadings --raw --output START,SECTORS --nr "$partition" "$image") ||
        die "$image has no partition $partition"
    part=(--offset $((start * 512)) --sizelimit $((sectors * 512)))
fi
loop=$(losetup --find --show --read-only "${part[@]}" "$image")
type=$(blkid --probe --output value --match-tag TYPE "$loop" || true)
options=$(mount_options "$type")
folder=$(mktemp --directory)
mount --types "$type" --options "$options" "$loop" "$folder"

mkdir -p "$target"
for path in "${paths[@]}"; do
    [[ -e $folder/$path || -L $folder/$path ]] || die "there is no $path in $image"
    cp --archive "$folder/$path" "$target/"
done
find "${paths[@]/#/$folder/}" -type f -exec sha256sum {} + | sed "s|  $folder/*|  /|"
