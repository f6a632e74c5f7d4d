#!/bin/bash
# All that must hold, in one command: format, lint, types, and the tests against a real Ceph and real mounts, with the
# pyfuse3 and trio of Debian as well as with the newest. Installs what is missing.
#
# The two runs of the tests go side by side, since both wait more than they compute: each has a Ceph of its own. What
# the second one says is shown when the first has ended.
#
#   sudo ./tests/run.sh [PYTEST-ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(attr ceph-mon ceph-mgr ceph-osd ceph-common e2fsprogs mount qemu-utils restic rsync
    bash-completion fish man-db systemd zsh) # what tests of an installation look through
examples/install.sh --venv .venv-newest --test --newest "${packages[@]}"
examples/install.sh --venv .venv-debian --test "${packages[@]}"

failed=()
aside=""
said=$(mktemp)

# A job in the background ignores Ctrl-C, and pytest is to end by it in good order; tests send it to children, too.
interruptible=(env --default-signal=INT)

# Each in a mount namespace of its own, without the other's mounts: a copy of a mount keeps it alive, and each test that
# makes a namespace copies all that are there.
alone=(unshare --mount bash -c 'umount --all --lazy --types fuse.rbdfs; exec "$@"' alone)

show() {
    printf '\n$ %s\n' "$*"
}

check() {
    show "$@"
    "${interruptible[@]}" "${alone[@]}" "$@" || failed+=("$*")
}

# What runs aside takes its Ceph and its mounts down before it ends. Ctrl-C has reached it by itself, and a second one
# would keep it from that.
finish() {
    local status=$?
    trap '' INT TERM HUP
    if [[ -n $aside ]]; then
        ((status == 130)) || kill -INT "$aside" 2>/dev/null || true
        wait "$aside" || true
    fi
    rm -f "$said"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# In the opposite order, so that what waits runs beside what computes.
paths=("$@")
(($# > 0)) || mapfile -t paths < <(ls --directory --reverse tests/*/)
newest=(.venv-newest/bin/python -X faulthandler -m pytest -o cache_dir=.pytest_cache/newest "${paths[@]}")
"${interruptible[@]}" "${alone[@]}" "${newest[@]}" >"$said" 2>&1 &
aside=$!

check .venv-newest/bin/python -m ruff format --check
check .venv-newest/bin/python -m ruff check
check .venv-newest/bin/python -m mypy # there, because only the newest pyfuse3 and trio have types
check .venv-debian/bin/python -X faulthandler -m pytest "$@"

show "${newest[@]}"
wait "$aside" || failed+=("${newest[*]}")
aside=""
cat "$said"

((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}" >&2
exit $((${#failed[@]} > 0))
