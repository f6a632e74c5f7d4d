#!/bin/bash
# Keep copies of images with rsync. Takes a snapshot of each image, copies it, and removes it. A copy is as thin as its
# image. If there is an older copy, only what differs is written.
#
#   ./examples/backup-rsync.sh /mnt/rbdfs/rbd/vm1 /mnt/rbdfs/rbd/vm2 /backup
#
# The key of the rbd command (CEPH_ARGS, /etc/ceph) must be allowed to take snapshots: osd 'profile rbd'.
set -euo pipefail

die() {
    echo "backup-rsync.sh: $*" >&2
    exit 1
}

spec=""
drop_snapshot() {
    if [[ -n $spec ]]; then
        rbd snap rm --no-progress "$spec"
        spec=""
    fi
}
trap drop_snapshot EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

(($# > 1)) || die "say which images, and the folder for their copies: /mnt/rbdfs/rbd/vm1 ... /backup"
folder=${*: -1}
failed=()
for image in "${@:1:$#-1}"; do
    mount=$(findmnt --noheadings --output TARGET --types fuse.rbdfs --target "$image") ||
        die "$image is not in an rbdfs mount"
    name=$(realpath --relative-to="$mount" "$image") # pool/image, or pool/namespace/image
    snapshot=backup-$(date +%Y%m%d-%H%M%S)-$$
    rbd snap create --no-progress "$name@$snapshot"
    spec=$name@$snapshot
    copy=$folder/$name
    mkdir -p "$(dirname "$copy")"
    # --ignore-times: RBD updates an image's time late, so an image that changed can look unchanged.
    rsync --ignore-times --times --sparse --inplace --no-whole-file "$image@$snapshot" "$copy" || failed+=("$name")
    drop_snapshot
done
((${#failed[@]} == 0)) || die "not copied: ${failed[*]}"
