#!/bin/bash
# A cluster of one release with a client of the other, both ways: images of every kind are made by the cluster's release,
# and listed, read, sought through, exported and mapped by rbdfs with the client's, as the client's `rbd` command says.
#
#   sudo ./tests/cross_release.sh [OPTION...] ROOT ROOT [PYTEST-ARGUMENT...]
#
#   ROOT                  a root folder of a release (from debootstrap, say), with this checkout and what tests/run.sh
#                         installs in it
#   --checkout FOLDER     where the checkout is in both roots [where this one is]
#   --python PATH         the Python that runs rbdfs and its tests, from there [.venv-debian/bin/python]
#
# The two share the network, which is loopback, and a folder with the cluster in it; each has its own programs.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -z ${CROSS_RELEASE_NAMESPACE:-} ]]; then # mounts that end with us
    CROSS_RELEASE_NAMESPACE=private exec unshare --mount "$0" "$@"
fi

checkout=$here
python=.venv-debian/bin/python
while (($#)); do
    case $1 in
        --checkout) checkout=$2; shift ;;
        --python) python=$2; shift ;;
        *) break ;;
    esac
    shift
done
(($# >= 2)) || { sed -n 's/^#  \{0,3\}//p' "$0" >&2; exit 2; }
roots=("$(realpath "$1")" "$(realpath "$2")")
shift 2

shared=$(mktemp -d /var/tmp/rbdfs-cross.XXXXXX)
cluster=""
cluster_root="" # where it runs

in_root() {
    local root=$1
    shift
    chroot "$root" /usr/bin/env --chdir="$checkout" --unset=CEPH_CONF --unset=CEPH_ARGS "$@"
}

take_down() {
    [[ -z $cluster_root ]] || in_root "$cluster_root" "$python" -m rbdfs devcluster down "$cluster"
    cluster_root=""
}

finish() {
    local root
    trap '' INT TERM
    take_down || true
    for root in "${roots[@]}"; do
        umount --lazy "$root$shared" && rmdir "$root$shared" || true
    done
    rm -rf --one-file-system "$shared"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for root in "${roots[@]}"; do
    mkdir -p "$root$shared"
    mount --bind "$shared" "$root$shared"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/run"
done

failed=0
for client in "${roots[@]}"; do
    for server in "${roots[@]}"; do
        [[ $server != "$client" ]] || continue
        cluster=$(mktemp -d "$shared/cluster.XXXX") # the tests leave files in it
        printf '\n%s with a client of %s\n' "$(in_root "$server" ceph-osd --version)" "$(in_root "$client" rbd --version)"
        cluster_root=$server
        in_root "$server" "$python" -m rbdfs devcluster up "$cluster" >/dev/null
        in_root "$server" "$python" -m tests.golden.images "$cluster"
        in_root "$client" "$python" -m pytest -o cache_dir=/tmp/.pytest_cache --devcluster "$cluster" \
            tests/ceph/test_every_kind.py "$@" || failed=1
        take_down
    done
done
exit "$failed"
