#!/bin/sh
# What `systemctl` means to the runbook, on a host without systemd: reads the unit that the runbook installed and runs
# its program as a daemon, as the unit's user, with a clean environment and the unit's state directory. Ends it with
# SIGTERM to the one process, as KillMode=process and a unit with one process both mean. It restarts nothing.
set -eu

state=/var/lib/units
mkdir -p "$state"

say() { echo "systemctl: $*" >&2; exit 1; }

value() {
    sed -n "s/^$2=//p" "/etc/systemd/system/$1.service" | tail -n 1
}

running() {
    [ -s "$state/$1.pid" ] && kill -0 "$(cat "$state/$1.pid")" 2> /dev/null
}

start() {
    running "$1" && return
    [ -f "/etc/systemd/system/$1.service" ] || say "there is no unit $1"
    user=$(value "$1" User) group=$(value "$1" Group) directory=$(value "$1" StateDirectory)
    install -d -m "$(value "$1" StateDirectoryMode)" -o "$user" -g "$group" "/var/lib/$directory"
    rm -f "$state/$1.pid"
    # The pid is this shell's, which becomes the program.
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/var/lib/helix \
        setsid sh -c 'echo $$ > "$0.next"; mv "$0.next" "$0"; exec setpriv --reuid "$1" --regid "$2" --clear-groups $3' \
        "$state/$1.pid" "$user" "$group" "$(value "$1" ExecStart)" < /dev/null >> "/var/log/$1.log" 2>&1 &
    until [ -s "$state/$1.pid" ]; do sleep 0.02; done
}

stop() {
    running "$1" || return 0
    # It may end by itself just now.
    kill -TERM "$(cat "$state/$1.pid")" 2> /dev/null || return 0
    while running "$1"; do sleep 0.05; done
}

verb=$1
shift
[ "${1:-}" != --now ] || shift
[ $# = 1 ] || say "$verb takes one unit"
case $verb in
    enable | start) start "$1" ;;
    disable | stop) stop "$1" ;;
    restart) stop "$1"; start "$1" ;;
    reload)
        running "$1" || say "$1 does not run"
        sh -c "MAINPID=$(cat "$state/$1.pid"); $(value "$1" ExecReload)"
        ;;
    is-active) running "$1" ;;
    *) say "this test knows no systemctl $verb" ;;
esac
