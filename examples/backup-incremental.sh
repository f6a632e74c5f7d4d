#!/bin/bash
# Back up a pool to a folder, one file for each image. Takes a snapshot of the image, writes what has changed since the
# last one into the file, and removes older snapshots. Needs no mount.
#
#   ./examples/backup-incremental.sh [OPTION...] POOL[/NAMESPACE] FOLDER [IMAGE...] [-- EXPORT-OPTION...]
#
#   FOLDER              the target: FOLDER/IMAGE.raw. One folder is for one pool, or one namespace of it
#   IMAGE...            only these [all images of the pool]
#   --keep N            keep the last N backups as FOLDER/history/IMAGE/SNAPSHOT.raw [0]. If files can share blocks (XFS,
#                       Btrfs), each backup takes the time and room of what changed; on other file systems, of a whole
#                       copy: then snapshots of FOLDER by the file system are better
#   --snapshots N       leave the newest N snapshots in the cluster [1]; the next backup starts from the last one
#   --prefix NAME       how the snapshots are called: NAME-20261127-013000, in UTC [backup]. All but the newest N
#                       snapshots with this NAME are removed, so each folder for the same pool needs its own NAME
#   --id NAME           as client.NAME [admin]; its key must be allowed to take snapshots: mon 'profile rbd'
#                       osd 'profile rbd'
#   EXPORT-OPTION...    options of 'rbdfs export --help', such as --limit-rate 100M
#
# If a backup cannot start from a file (somebody wrote to it, or its snapshot or image was removed), all of the file is
# compared with the image, and the summary says so. The next run continues a backup that was interrupted.
#
# Standard output has a line for each image, and the totals. The exit status is for a monitor: 0 everything is backed up,
# 1 something is not (the others are), 2 wrong usage, 128+N stopped by signal N.
# rbdfs-backup.timer runs it each night.
set -euo pipefail
shopt -s nullglob dotglob

keep=0
snapshots=1
prefix=backup
arguments=()
options=() # of rbdfs export
id=()
stopped="" # the exit status, once a signal has come
child=""

usage() {
    sed -n '2,/^set/ { /^#/ s/^# \{0,1\}//p }' "$0"
}

die() {
    echo "backup-incremental.sh: $*" >&2
    exit 1
}

misuse() {
    echo "backup-incremental.sh: $*; see --help" >&2
    exit 2
}

# A signal ends the command that runs. The script then cleans up as after any other failure.
stop() {
    stopped=$1
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# The last command's last line.
why() {
    local line
    line=$(sed '/./!d; s/^rbdfs: //; s/^rbd: //' "$work/err" | tail -n 1)
    echo "${line:-${stopped:+stopped before it began, }exit status $1}"
}

# Run a command, and end it at a signal. $reason is why it failed.
run() {
    local status=$stopped
    : >"$work/err"
    if [[ -z $stopped ]]; then
        "$@" </dev/null >"$work/out" 2>"$work/err" &
        child=$!
        [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal to us ends a wait
        status=0
        wait "$child" || status=$?
        child=""
    fi
    ((status == 0)) || reason=$(why "$status")
    return "$status"
}

# Run the rbd command to its end, also after a signal: otherwise its effect is unknown. $reason is why it failed.
rbd_command() {
    rbd "$@" </dev/null >"$work/out" 2>"$work/err" || {
        reason="rbd ${*:1:2}: $(why $?)"
        return 1
    }
}

# Evaluate a Python expression on JSON and print the list of strings that it gives, with NUL after each.
pick() {
    /usr/bin/python3 -Ic '
import json, os, sys
it = json.loads(os.fsdecode(sys.stdin.buffer.read()))
for each in eval(sys.argv[1]):
    sys.stdout.buffer.write(os.fsencode(f"{each}\0"))
' "$1"
}

# Put our snapshots of an image into $own, the oldest first, without those that are protected.
list_own() {
    local all each
    own=()
    rbd_command snap ls "$1" --format json || return 1
    mapfile -t -d '' all < <(pick '[s["name"] for s in sorted(it, key=lambda s: s["id"]) if s["protected"] != "true"]' \
        <"$work/out")
    for each in "${all[@]}"; do
        [[ ! $each =~ ^"$prefix"-[0-9]{8}-[0-9]{6}$ ]] || own+=("$each")
    done
}

# Put the snapshots that a file's label names into $held: the one that it was a whole copy of, and those of which it may
# have parts.
read_label() {
    local label
    held=()
    label=$(/usr/bin/python3 -Ic 'import os, sys; print(os.fsdecode(os.getxattr(sys.argv[1], "user.rbdfs.copy")))' "$1" \
        2>/dev/null || cat "$1.rbdfs" 2>/dev/null) || return 0
    mapfile -t -d '' held < <(pick '[it["of"]["snapshot"] if it["of"] else ""] + [s["snapshot"] for s in it["towards"]]' \
        <<<"$label" 2>/dev/null)
}

# Whether an export that makes a file a copy of a snapshot has begun.
is_begun() {
    [[ ! -e $1.partial ]] || return 0
    read_label "$1"
    [[ " ${held[*]} " == *" $2 "* ]]
}

# Make a file a copy of a snapshot.
update() {
    local command=(rbdfs export --update --no-progress --json "${options[@]}") status=0 figures said
    run "${command[@]}" "$1" "$2" || status=$?
    if ((status == 3)); then # nothing tells what the file is a copy of
        notes+=("compared as a whole: ${reason%%; --full*}")
        status=0
        run "${command[@]}" --full "$1" "$2" || status=$?
    fi
    ((status == 0)) || return 1
    mapfile -t -d '' figures < <(pick '[it[f"{each}_bytes"] for each in ("changed", "read", "written")]' <"$work/out")
    ((changed += figures[0], read += figures[1], written += figures[2])) || true
    mapfile -t said <"$work/err"
    notes+=("${said[@]#rbdfs: }")
}

# Copy an image's file, which is a whole copy of this snapshot, to its history. Nobody writes to it at this time.
keep_copy() {
    local file=$1 snapshot=$2 kept=$folder/history/$3 locked status=0
    local new=$kept/$snapshot.raw entries
    run mkdir -p "$kept" || return 1
    rm -f "$kept/$prefix"-*.partial
    exec {locked}<"$file"
    run flock --shared --nonblock "$locked" || reason="another export writes to $file now" status=1
    if ((status == 0)); then
        read_label "$file"
        [[ ${held[*]} == "$snapshot" ]] || reason="$file was changed by another export" status=1
    fi
    if ((status == 0)); then
        run cp --reflink=auto --sparse=always "$file" "$new.partial" && run sync "$new.partial" &&
            run mv -T "$new.partial" "$new" && run sync "$kept" || status=1
    fi
    exec {locked}<&-
    ((status == 0)) || {
        rm -f "$new.partial"
        return 1
    }
    entries=("$kept/$prefix"-????????-??????.raw)
    ((${#entries[@]} <= keep)) || run rm "${entries[@]:0:${#entries[@]}-keep}"
}

# Back up one image. $reason is why it failed.
back_up() {
    local name=$1 image=$where/$1 file=$folder/$1.raw own=() held=() old excess
    if [[ $name == *[/@]* || $name == . || $name == .. ]]; then
        reason="neither . nor .., nor a name with / or @ in it, can be exported to a file here; 'rbd rename' it"
        return 1
    fi
    if [[ ! -e $file && -e $file.partial ]]; then
        # A first export that did not end: it can be continued with the same snapshot only.
        list_own "$image" || return 1
        ((${#own[@]} == 0)) || update "$image@${own[-1]}" "$file" || return 1
    fi

    list_own "$image" || return 1
    snapshot=$prefix-$(date --utc +%Y%m%d-%H%M%S)
    while [[ " ${own[*]} " == *" $snapshot "* ]]; do # a run that has ended within this second
        sleep 0.2
        snapshot=$prefix-$(date --utc +%Y%m%d-%H%M%S)
    done
    rbd_command snap create --no-progress "$image@$snapshot" || return 1
    if ! update "$image@$snapshot" "$file"; then
        # The next export needs the snapshot that this one began with.
        is_begun "$file" "$snapshot" || rbd snap rm --no-progress "$image@$snapshot" >/dev/null 2>&1 ||
            reason+="; $image@$snapshot could not be removed"
        return 1
    fi

    list_own "$image" || return 1
    excess=$((${#own[@]} - snapshots))
    for old in "${own[@]:0:excess > 0 ? excess : 0}"; do
        rbd_command snap rm --no-progress "$image@$old" || {
            reason="$file is a copy of $snapshot, and $old could not be removed: $reason"
            return 1
        }
    done
    ((keep == 0)) || keep_copy "$file" "$snapshot" "$name" || {
        reason="$file is a copy of $snapshot, and not in the history: $reason"
        return 1
    }
}

size() {
    numfmt --to=iec-i --suffix=B "$1"
}

figures() {
    echo "changed $(size "$1"), read $(size "$2"), written $(size "$3"), $4 s"
}

while (($#)); do
    case $1 in
        --keep) keep=${2:-}; shift ;;
        --snapshots) snapshots=${2:-}; shift ;;
        --prefix) prefix=${2:-}; shift ;;
        --id) id=(--id "${2:-}"); shift ;;
        -h | --help) usage; exit ;;
        --) options=("${@:2}"); break ;;
        --*) misuse "unknown option $1" ;;
        *) arguments+=("$1") ;;
    esac
    shift || misuse "an option lacks its value"
done
((${#arguments[@]} >= 2)) || misuse "say which pool, and which folder"
[[ $keep =~ ^[0-9]{1,6}$ ]] || misuse "--keep takes a number"
[[ $snapshots =~ ^[1-9][0-9]{0,5}$ ]] || misuse "--snapshots takes a number, from 1 on"
[[ $prefix =~ ^[A-Za-z0-9._-]+$ ]] || misuse "--prefix takes letters, digits and . _ -"
((${#id[@]} == 0)) || export CEPH_ARGS="${CEPH_ARGS:-} ${id[*]}"
where=${arguments[0]}
folder=${arguments[1]}
names=("${arguments[@]:2}")
[[ -d $folder ]] || misuse "there is no folder $folder"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# The lock file also says which pool the folder is for: otherwise the images of another pool would be written over these.
# An export that a killed run left behind holds the lock, too.
marker=$folder/.backup-incremental
exec {lock}>>"$marker"
flock --nonblock "$lock" || die "another backup to $folder is at work"
cluster=$(ceph --connect-timeout 30 fsid) || die "the cluster does not answer"
rbd_command ls "$where" --format json || die "$reason"
if [[ ! -s $marker ]]; then echo "$cluster $where" >&"$lock"; fi
[[ $(<"$marker") == "$cluster $where" ]] || misuse "$folder has backups of $(<"$marker"), not of $cluster $where"

mapfile -t -d '' there < <(pick it <"$work/out")
((${#names[@]})) || names=("${there[@]}")
good=0
failed=0
totals=(0 0 0)
for name in "${names[@]}"; do
    [[ -z $stopped ]] || break
    began=$SECONDS changed=0 read=0 written=0 notes=() reason="" snapshot=""
    if back_up "$name"; then
        line="$snapshot, $(figures $changed $read $written $((SECONDS - began)))"
        ((good += 1))
    else
        line="FAILED: $reason"
        ((failed += 1))
    fi
    totals=($((totals[0] + changed)) $((totals[1] + read)) $((totals[2] + written)))
    ((${#notes[@]} == 0)) || line+=$(printf '; %s' "${notes[@]}")
    line="$name: $line"
    echo "${line//[[:cntrl:]]/?}"
done

declare -A is_there
for name in "${there[@]}"; do is_there["=$name"]=1; done
for file in "$folder"/*.raw; do
    name=${file##*/}
    name=${name%.raw}
    line="$name: not in $where any more, $file stays"
    [[ ${is_there["=$name"]:-} ]] || echo "${line//[[:cntrl:]]/?}"
done
left=$((${#names[@]} - good - failed))
echo "$good of ${#names[@]} images backed up, $failed FAILED$( ((left == 0)) || echo ", $left not tried");" \
    "$(figures "${totals[@]}" $SECONDS)"
[[ -z $stopped ]] || exit "$stopped"
((failed == 0)) || exit 1
