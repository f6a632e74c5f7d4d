#!/bin/bash
# Install rbdfs on Debian 12 or 13: Debian's packages, and a virtual environment with rbdfs, which runs from this checkout.
# Does only what is not yet done.
#
#   sudo ./examples/install.sh [OPTION...] [DEBIAN-PACKAGE...]
#   sudo ./examples/install.sh --system [--newest]    for the whole host; you can delete this checkout afterwards
#   sudo ./examples/install.sh --remove               remove what --system installed
#
#   DEBIAN-PACKAGE...   install these as well
#   --venv FOLDER       the virtual environment [.venv]
#   --test              with what the tests need from PyPI
#   --newest            with the newest pyfuse3 and trio, built from PyPI, instead of Debian's
#
# Then .venv/bin/rbdfs is there, on any host that reaches a Ceph cluster.
#
# --system makes a virtual environment in /opt/rbdfs and installs /usr/local/bin/rbdfs, the mount helper for fstab, the
# systemd unit, the man page, and completion for bash, zsh and fish. Called again, it upgrades. Running mounts keep their
# version; the first upgrade after they have ended removes it.
set -euo pipefail
cd "$(dirname "$0")/.."

way=checkout
venv=$PWD/.venv
checkout=.
from_pypi=()
packages=(
    python3-rados python3-rbd    # Ceph's own bindings, which are not on PyPI
    python3-pyfuse3 python3-trio
    python3-tqdm                 # the progress bar of an export
    python3-prometheus-client    # the figures of --metrics
    python3-systemd              # the journal, with levels and images as fields; optional
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

# A virtual environment contains its own path, and that of rbdfs: moved or copied, it does not work.
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
    # With the system's Python, even if another python3 is first on PATH: only it sees Debian's modules.
    is_made_here || run /usr/bin/python3 -m venv --clear --system-site-packages "$venv"
    run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --upgrade --editable "$checkout" "${from_pypi[@]}"
    "$venv/bin/python" -c 'import pyfuse3, rados, rbd, rbdfs, trio' || die "$venv lacks a module, see above"
    echo "$venv $PWD" >"$venv/rbdfs-checkout"
}

# ---- for the whole host

opt=/opt/rbdfs
manifest=$opt/manifest # the files and folders that were made outside of it; each folder before what is in it
program=/usr/local/bin/rbdfs
man_page=/usr/local/share/man/man8/rbdfs.8
mount_helper=/sbin/mount.fuse.rbdfs # mount(8) looks nowhere else
unit=/usr/local/lib/systemd/system/rbdfs@.service
completion_bash=/usr/local/share/bash-completion/completions/rbdfs
completion_zsh=/usr/local/share/zsh/site-functions/_rbdfs
completion_fish=/etc/fish/completions/rbdfs.fish # Debian's fish does not look into /usr/local
targets=("$program" "$man_page" "$mount_helper" "$unit" "$completion_bash" "$completion_zsh" "$completion_fish")
new_version=""
source=""

is_ours() {
    grep -qsxF -- "$1" "$manifest"
}

note() {
    is_ours "$1" || echo "$1" >>"$manifest"
}

make_folder() {
    [[ ! -d $1 ]] || return 0
    make_folder "$(dirname "$1")"
    note "$1"
    run mkdir "$1"
}

# Never writes into an existing file: somebody may be running it.
put() {
    make_folder "$(dirname "$3")"
    note "$3"
    run install -m "$1" "$2" "$3"
}

# The processes that run a program in a folder: Python is called by the path of its virtual environment. The same path
# may be another folder in a container.
users_of() {
    local process program
    for process in /proc/[0-9]*; do
        IFS= read -r -d '' program <"$process/cmdline" || continue
        [[ $program == "$1"/* && $process/root$1 -ef $1 ]] || continue
        echo "${process#/proc/}"
    done 2>/dev/null
}

reload_systemd() {
    [[ ! -d /run/systemd/system ]] || run systemctl daemon-reload
}

lock() {
    exec {locked}>>"$manifest"
    flock --nonblock "$locked" || die "another install.sh is at work"
}

refuse_to_overwrite() {
    local target
    [[ ! -e $opt || -e $manifest ]] || die "$opt is there, and --system did not make it; remove it first"
    for target in "${targets[@]}"; do
        [[ ! -e $target && ! -L $target ]] || is_ours "$target" ||
            die "$target is there, and --system did not make it; remove it first"
    done
}

clean_up() {
    rm -rf "$source" "$new_version" "$program.new"
    [[ -s $manifest ]] || rm -rf "$opt"
}

install_system() {
    local shell version python
    ((EUID == 0)) || die "run it with sudo"
    umask 022
    refuse_to_overwrite
    mkdir -p "$opt"
    lock
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    source=$(mktemp -d) # pip builds in it, and would take what an earlier build left
    cp -r pyproject.toml README.md LICENSE rbdfs "$source"
    # Each version has its own folder: running processes still load modules from theirs.
    new_version=$opt/$(date +%Y%m%dT%H%M%S)
    run /usr/bin/python3 -m venv --system-site-packages "$new_version"
    run "$new_version/bin/python" -m pip install --quiet --disable-pip-version-check \
        --upgrade "${source}[completion]" "${from_pypi[@]}"
    python=("$new_version/bin/python" -I) # without the modules in this folder
    run "${python[@]}" -c 'import pyfuse3, rados, rbd, rbdfs, trio'
    "${python[@]}" -m rbdfs.cli.manual >"$source/man_page"
    for shell in bash zsh fish; do
        "${python[@]}" -m rbdfs.cli.completion $shell >"$source/$shell"
    done

    make_folder "$(dirname "$program")"
    note "$program"
    ln -sfT "$new_version/bin/rbdfs" "$program.new"
    version=$new_version
    new_version="" # stays from here on
    run mv -T "$program.new" "$program"
    put 0755 examples/mount.fuse.rbdfs "$mount_helper"
    put 0644 examples/rbdfs@.service "$unit"
    put 0644 "$source/man_page" "$man_page"
    put 0644 "$source/bash" "$completion_bash"
    put 0644 "$source/zsh" "$completion_zsh"
    put 0644 "$source/fish" "$completion_fish"
    reload_systemd
    remove_old_versions "$version"
    echo "Installed $("$program" --version). Go on with: man rbdfs, or $program mount --help"
}

remove_old_versions() {
    local folder processes
    for folder in "$opt"/*/; do
        folder=${folder%/}
        [[ $folder != "$1" ]] || continue
        processes=$(users_of "$folder")
        if [[ $processes ]]; then
            echo "$folder stays: it is in use by process" $processes
        else
            run rm -r "$folder"
        fi
    done
}

remove_system() {
    local process processes path paths
    [[ -e $manifest ]] || die "there is nothing that --system installed"
    ((EUID == 0)) || die "run it with sudo"
    lock
    processes=$(users_of "$opt")
    for process in $processes; do
        echo "in use by process $process: $(tr '\0' ' ' <"/proc/$process/cmdline")" >&2
    done
    [[ ! $processes ]] || die "nothing was removed; end these processes first (umount MOUNTPOINT)"
    mapfile -t paths < <(tac "$manifest")
    for path in "${paths[@]}"; do
        if [[ -d $path && ! -L $path ]]; then
            rmdir --ignore-fail-on-non-empty "$path"
        else
            run rm -f "$path"
        fi
    done
    run rm -r "$opt"
    reload_systemd
    echo "Removed. These stay:"
    echo "  Debian packages, if nothing else needs them: apt-get remove ${packages[*]}"
    for path in /etc/default/rbdfs /etc/systemd/system/*/rbdfs@*.service; do
        [[ ! -e $path && ! -L $path ]] || echo "  $path"
    done
    ! grep -q '[[:space:]]fuse\.rbdfs[[:space:]]' /etc/fstab || echo "  /etc/fstab: lines of the type fuse.rbdfs"
}

while (($#)); do
    case $1 in
        --system | --remove) way=${1#--} ;;
        --venv) venv=$(realpath --canonicalize-missing "$2"); shift ;;
        --test) checkout='.[test]' ;;
        --newest) from_pypi=(pyfuse3 trio); packages+=(gcc libc6-dev libfuse3-dev pkg-config python3-dev) ;;
        -*) die "unknown option $1" ;;
        *) packages+=("$1") ;;
    esac
    shift
done
[[ $way == checkout || $venv$checkout == $PWD/.venv. ]] || die "--$way takes neither --venv nor --test"
case $way in
    remove) remove_system ;;
    system) install_packages; install_system ;;
    checkout) install_packages; is_current || make_venv ;;
esac
