#!/bin/bash
# All that must hold, in one command: format, lint, types, and the tests against a real Ceph and real mounts, with the
# pyfuse3 and trio of Debian 12 as well as with the newest. Installs what is missing.
#
#   sudo ./tests/run.sh [PYTEST-ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(ceph-mon ceph-mgr ceph-osd ceph-common e2fsprogs mount rsync)
examples/install.sh --venv .venv-newest --test --newest "${packages[@]}"
examples/install.sh --venv .venv-debian --test "${packages[@]}"

failed=()
check() {
    printf '\n$ %s\n' "$*"
    env --default-signal=INT "$@" || failed+=("$*") # a job in the background ignores Ctrl-C; tests send it to children
}
check .venv-newest/bin/python -m ruff format --check
check .venv-newest/bin/python -m ruff check
check .venv-newest/bin/python -m mypy # there, because only the newest pyfuse3 and trio have types
check .venv-debian/bin/python -m pytest "$@"
check .venv-newest/bin/python -m pytest "$@"

((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}" >&2
exit $((${#failed[@]} > 0))
