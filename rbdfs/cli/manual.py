"""The man page rbdfs(8), from the option parser: `python -m rbdfs.cli.manual`."""

import argparse
import re
from collections.abc import Iterable, Iterator

from rbdfs import __version__
from rbdfs.cli import make_parser
from rbdfs.cli.options import CLUSTER_OPTIONS

PAGE = r"""
.\" names of options must not be hyphenated
.nr HY 0
.TH RBDFS 8 "" "rbdfs {version}" "System Administration"
.SH NAME
rbdfs \- every image in a Ceph cluster as a plain file
.SH SYNOPSIS
{synopsis}
.br
\fBrbdfs\fR [\fICOMMAND\fR] \fB\-\-help\fR
.br
\fBrbdfs\fR \fB\-\-version\fR
.SH DESCRIPTION
.B rbdfs mount
shows the RBD images of a Ceph cluster as read\-only files, for any program that reads files:
.BR cp (1),
.BR dd (1),
.BR rsync (1),
backup programs,
.BR qemu\-img (1),
a read\-only loop mount.
A read that the cluster does not answer in full is an error, never a short file and never zeros.
.PP
.B rbdfs status
shows the mounts of this host,
.B rbdfs export
copies one image without a mount,
.B rbdfs verify
compares a copy with it,
.B rbdfs diff
lists what has changed in it,
.B rbdfs map
shows where its bytes are, and
.B rbdfs devcluster
runs a real Ceph in a folder, for experiments.
.SS "What is where"
.TP
.I POOL/IMAGE
An image, as it is now.
.TP
.I POOL/IMAGE@SNAPSHOT
A snapshot, by name. It is in no listing.
.TP
.I POOL/.snap/IMAGE/
The snapshots of an image, listed.
.TP
.I POOL/NAMESPACE/IMAGE
The same in a namespace; so are
.I NAMESPACE/IMAGE@SNAPSHOT
and
.IR NAMESPACE/.snap/ .
.TP
.I POOL/@NAMESPACE
A namespace that has the name of an image.
.PP
Characters that a file name cannot have are written as in a URL: the image
.I a/b
is the file
.IR a%2Fb .
The extended attributes
.I user.rbd.*
of a file describe its image:
.BR "getfattr \-d" .
.SH COMMANDS
{commands}
.SH CLUSTER OPTIONS
As of the
.BR rbd (8)
command.
{cluster_options}
.SH EXIT STATUS
.TP
.B 0
Success.
.TP
.B 1
The command failed. One line on standard error says why.
.BR "rbdfs verify" :
or the file differs, which standard output says.
.TP
.B 2
Wrong usage.
.TP
.B 3
.BR "rbdfs devcluster status" :
the cluster does not run.
.TP
.B 130
Interrupted.
.TP
.BI 128+ N
.BR "rbdfs export" ,
.BR "rbdfs verify" ,
.BR "rbdfs diff" ,
.BR "rbdfs map" :
stopped by signal
.IR N .
.PP
.B rbdfs devcluster run
has the exit status of its command.
.SH ENVIRONMENT
.TP
.B CEPH_CONF
The ceph.conf, if
.B \-\-conf
does not say another.
.TP
.B CEPH_ARGS
Options of Ceph that the command line does not have, as for
.BR rbd (8):
.B \-\-id
.IR backup .
.SH FILES
.TP
.I /etc/ceph/ceph.conf
How to reach the cluster.
.TP
.I /etc/ceph/ceph.client.ID.keyring
The key of
.IR client.ID .
.TP
.I /etc/fuse.conf
Users other than root may use
.B \-\-allow\-other
if it has the line
.BR user_allow_other .
.TP
.I /etc/fstab
.BR mount (8)
takes lines of the type
.BR fuse.rbdfs .
.TP
.I /etc/default/rbdfs
.B RBDFS_OPTIONS
for the systemd unit
.IR rbdfs@.service .
.SH EXAMPLES
Mount, copy an image and one of its snapshots, unmount:
.PP
.in +4n
.EX
rbdfs mount \-\-id backup /mnt/rbdfs
cp /mnt/rbdfs/rbd/vm1 vm1.raw
cp /mnt/rbdfs/rbd/vm1@monday vm1\-monday.raw
umount /mnt/rbdfs
.EE
.in
.PP
A key for it, which may only read images:
.PP
.in +4n
.EX
ceph auth get\-or\-create client.backup mon \(aqprofile rbd\(aq \e
    osd \(aqprofile rbd\-read\-only\(aq \-o /etc/ceph/ceph.client.backup.keyring
.EE
.in
.PP
In
.IR /etc/fstab :
.PP
.in +4n
.EX
rbdfs  /mnt/rbdfs  fuse.rbdfs  id=backup,_netdev,nofail  0  0
.EE
.in
.PP
By systemd:
.PP
.in +4n
.EX
echo \(aqRBDFS_OPTIONS=\-\-id backup \-\-allow\-other\(aq >/etc/default/rbdfs
systemctl enable \-\-now rbdfs@$(systemd\-escape \-\-path /mnt/rbdfs).service
.EE
.in
.PP
Copy a snapshot to a file, or continue an interrupted copy:
.PP
.in +4n
.EX
rbdfs export \-\-resume rbd/vm1@monday vm1.raw
.EE
.in
.SH SEE ALSO
.BR rbd (8),
.BR ceph (8),
.BR rbd\-fuse (8),
.BR mount (8),
.BR fusermount3 (1),
.BR fuse (4),
.BR systemd.unit (5)
"""


def manual() -> str:
    """The man page, in the macros of man(7)."""
    commands = list(_commands(make_parser()))
    return PAGE.lstrip().format(
        version=__version__,
        synopsis="\n.br\n".join(_usage(command) for command in commands),
        commands="\n".join(_command(command) for command in commands),
        cluster_options=_options(next(options for each in commands if (options := _groups(each).get(CLUSTER_OPTIONS)))),
    )


# argparse has no public way to the contents of a parser.
# ruff: noqa: SLF001


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser of each command that has none below it."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for command in action.choices.values():
            yield from _commands(command)


def _groups(parser: argparse.ArgumentParser) -> dict[str | None, list[argparse.Action]]:
    return {group.title: group._group_actions for group in parser._action_groups}


def _command(parser: argparse.ArgumentParser) -> str:
    """The description of a command and its options, without the cluster options, which have a section of their own."""
    groups = _groups(parser)
    lines = [f".SS {_roff(parser.prog)}", _roff(parser.description or "")]
    lines += [_options(actions) for title, actions in groups.items() if title != CLUSTER_OPTIONS and actions]
    lines += [".PP", "It takes the cluster options as well."] * (CLUSTER_OPTIONS in groups)
    return "\n".join(lines)


def _usage(parser: argparse.ArgumentParser) -> str:
    words = [_value(action) for action in parser._actions if not action.option_strings]
    after = [r"\-\- \fICOMMAND\fR ..."] * ("-- COMMAND" in parser.format_usage())
    return " ".join([rf"\fB{_roff(parser.prog)}\fR [\fIOPTION\fR...]", *words, *after])


def _options(actions: Iterable[argparse.Action]) -> str:
    """Options and arguments with their help."""
    lines = []
    for action in actions:
        if action.dest != "help":
            names = ", ".join(rf"\fB{_roff(name)}\fR" for name in action.option_strings)
            value = "" if action.nargs == 0 else _value(action)
            lines += [".TP", f"{names} {value}".strip(), _roff(action.help or "")]
    return "\n".join(lines)


def _value(action: argparse.Action) -> str:
    """The value of an option or an argument: a name in italics, or the choices."""
    if action.choices is not None:
        return "|".join(rf"\fB{_roff(str(choice))}\fR" for choice in action.choices)
    name = rf"\fI{_roff(str(action.metavar or action.dest.upper()))}\fR"
    return f"[{name}]" if action.nargs == "?" else name


def _roff(text: str) -> str:
    """Escape text so that roff prints it unchanged."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    return re.sub(r"^(?=[.'])", r"\\&", text)


if __name__ == "__main__":
    print(manual(), end="")
