#!/bin/sh
# What `scp FILE... HOST:PATH` means to the runbook: the bytes are written in the other host's file system, as a new
# file renamed over an old one; with -r whole directories, into one that is there. What was brought is root's, and has the
# modes that it had. HOSTS names a directory with a file per host that holds the pid of its init process.
set -eu

recursive=no
if [ "$1" = -r ]; then
    recursive=yes
    shift
fi

for last; do :; done
host=${last%%:*} target=${last#*:}
pid=$(cat "$HOSTS/${host%%.*}.pid")
while [ $# -gt 1 ]; do
    if [ $recursive = yes ]; then
        tar -C "$(dirname "$1")" -cf - "$(basename "$1")" |
            nsenter --target "$pid" --mount tar -C "$target" --no-same-owner --preserve-permissions -xf -
        shift
        continue
    fi
    case $target in
        */) path=$target${1##*/} ;;
        *) path=$target ;;
    esac
    mode=$(stat -c %a "$1")
    nsenter --target "$pid" --mount sh -euc 'cat > "$0.next"; chmod "$1" "$0.next"; mv "$0.next" "$0"' "$path" "$mode" < "$1"
    shift
done
