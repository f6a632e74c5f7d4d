#!/bin/bash
# Back up images with restic. Takes a snapshot of each image, reads it, and removes it. An image has the same name in the
# repository each time, so restic stores only what changed.
#
#   export RESTIC_REPOSITORY=... RESTIC_PASSWORD_FILE=...      # as restic wants them; once: restic init
#   ./examples/backup-restic.sh /mnt/rbdfs/rbd/vm1 /mnt/rbdfs/rbd/vm2
#
#   restic snapshots --path /rbd:vm1                           # the backups of an image
#   restic dump --path /rbd:vm1 latest /rbd:vm1 >vm1.raw       # get it back
#
# The key of the rbd command (CEPH_ARGS, /etc/ceph) must be allowed to take snapshots: osd 'profile rbd'.
set -euo pipefail

die() {
    echo "backup-restic.sh: $*" >&2
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

(($# > 0)) || die "say which images: /mnt/rbdfs/rbd/vm1 ..."
failed=()
for image in "$@"; do
    mount=$(findmnt --noheadings --output TARGET --types fuse.rbdfs --target "$image") ||
        die "$image is not in an rbdfs mount"
    name=$(realpath --relative-to="$mount" "$image") # pool/image, or pool/namespace/image
    snapshot=backup-$(date +%Y%m%d-%H%M%S)-$$
    rbd snap create --no-progress "$name@$snapshot"
    spec=$name@$snapshot
    # Colons, because restic 0.18.0 accepts no name with a folder in it ("unable to save snapshot: open /rbd").
    restic backup --stdin --stdin-filename "${name//\//:}" <"$image@$snapshot" || failed+=("$name")
    drop_snapshot
done
((${#failed[@]} == 0)) || die "not backed up: ${failed[*]}"
