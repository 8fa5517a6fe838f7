# The first process of a host: makes its file systems private, then lives on and reaps whoever is left to it.
# $1 is an empty directory for this host alone; what is mounted there ends with the host.
set -eu
mount -t tmpfs -o size=8g,mode=0755 tmpfs "$1"
for tree in etc usr var root; do
    mkdir -p "$1/$tree/upper" "$1/$tree/work"
    chmod --reference="/$tree" "$1/$tree/upper"
    mount -t overlay -o "lowerdir=/$tree,upperdir=$1/$tree/upper,workdir=$1/$tree/work" overlay "/$tree"
done
hostname "$2"
ip link set lo up
echo ready
exec > /dev/null 2>&1 < /dev/null
# Only the first process of a process namespace takes its children along when it ends, and is left orphans to reap.
[ $$ = 1 ] || exec sleep 86400
while :; do
    sleep 3600 &
    wait $! || :
done
