#!/bin/bash
# Install rbdfs on Debian 12: Debian's packages, and a virtual environment with rbdfs, which runs from this checkout.
# Does only what is not done yet.
#
#   sudo ./examples/install.sh [OPTION...] [DEBIAN-PACKAGE...]
#
#   DEBIAN-PACKAGE...   install these as well
#   --venv FOLDER       the virtual environment [.venv]
#   --test              with what the tests need from PyPI
#   --newest            with the newest pyfuse3 and trio, built from PyPI, instead of Debian's
#
# Then .venv/bin/rbdfs is there, on any host that reaches a Ceph cluster. To have it on PATH:
#   sudo ln -s "$PWD/.venv/bin/rbdfs" /usr/local/bin/
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/.venv
checkout=.
from_pypi=()
packages=(
    python3-rados python3-rbd    # Ceph's own bindings, which are not on PyPI
    python3-pyfuse3 python3-trio
    python3-tqdm                 # the progress bar of an export
    fuse3                        # fusermount3: to mount without root
    python3-venv
)

die() {
    echo "install.sh: $*" >&2
    exit 1
}

run() {
    echo "$ $*" >&2
    "$@" || die "this failed: $*"
}

is_installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed* ]]
}

install_packages() {
    local package missing=()
    command -v apt-get >/dev/null || die "there is no apt-get; install by your system's own means: ${packages[*]}"
    for package in "${packages[@]}"; do
        is_installed "$package" || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "run it with sudo; these Debian packages are missing: ${missing[*]}"

    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    run "${apt[@]}" update
    run "${apt[@]}" install --yes --no-install-recommends "${missing[@]}" >/dev/null # its hundreds of lines
}

# A virtual environment names its own place, and rbdfs's: moved or copied, it is of no use.
is_made_here() {
    [[ -e $venv/rbdfs-checkout && $(<"$venv/rbdfs-checkout") == "$venv $PWD" ]] && "$venv/bin/python" -c '' 2>/dev/null
}

is_current() {
    local source
    is_made_here || return 1
    for source in pyproject.toml examples/install.sh; do
        [[ $venv/rbdfs-checkout -nt $source ]] || return 1
    done
}

make_venv() {
    # By the system's Python, whichever python3 is first on PATH: no other sees Debian's modules.
    is_made_here || run /usr/bin/python3 -m venv --clear --system-site-packages "$venv"
    run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --upgrade --editable "$checkout" "${from_pypi[@]}"
    "$venv/bin/python" -c 'import pyfuse3, rados, rbd, rbdfs, trio' || die "$venv lacks a module, see above"
    echo "$venv $PWD" >"$venv/rbdfs-checkout"
}

while (($#)); do
    case $1 in
        --venv) venv=$(realpath --canonicalize-missing "$2"); shift ;;
        --test) checkout='.[test]' ;;
        --newest) from_pypi=(pyfuse3 trio); packages+=(gcc libc6-dev libfuse3-dev pkg-config python3-dev) ;;
        -*) die "unknown option $1" ;;
        *) packages+=("$1") ;;
    esac
    shift
done
install_packages
is_current || make_venv
