#!/usr/bin/env bash
# The life of a disk, with a user's own tools: `disk.sh REBASEFS SOURCE`, in an empty directory, as anybody.
# A file system is made through the mount and filled with copies of SOURCE while the disk is rebased
# underneath, again and again; then it is checked and compared. Root has the kernel write it, through a
# loop device; an ordinary user debugfs. Says how many rebases there were, or what is wrong.
set -euo pipefail
export LC_ALL=C.UTF-8 PATH="$PATH:/usr/sbin:/sbin"
rebasefs=$1
source=$2
copies=4

fail() {
    echo "disk.sh: line ${BASH_LINENO[0]}: $*" >&2
    exit 1
}

clean_up() {
    touch stop
    wait
    ! mountpoint -q guest || umount guest
    [[ -z $device ]] || losetup -d "$device"
    ! mountpoint -q mnt || umount -l mnt 2>/dev/null || fusermount3 -uz mnt
}
device=
trap clean_up EXIT

# Backing files that have other bytes everywhere, so that each rebase has something to copy.
make_images() {
    head -c 64M /dev/urandom >one.img
    head -c 64M /dev/urandom >two.img
    sha256sum one.img two.img >images
    qemu-img create -q -f qcow2 -o cluster_size=16k -b one.img -F raw cow.qcow2
    qemu-img snapshot -c empty cow.qcow2
    mkdir mnt guest
}

rebase_again_and_again() {
    local number=0
    while [[ ! -e stop ]]; do
        echo '-b two.img -F raw' >mnt/ctl/rebase
        echo '--reclaim -b one.img -F raw' >mnt/ctl/rebase
        number=$((number + 2))
        echo "$number" >rebases
    done
}

# As root: the kernel's ext4.
make_file_system() {
    device=$(losetup -f --show mnt/disk.raw)
    mkfs.ext4 -q "$device"
    mount "$device" guest
}

copy() {
    cp -r "$source" "guest/$1"
    sync -f guest
}

leave() {
    umount guest
    losetup -d "$device"
    device=
}

read_back() {
    mount -o ro,loop "$1" guest
    cp -r guest "$2"
    umount guest
}

# As anybody: that of e2fsprogs, in the file itself.
if ((EUID != 0)); then
    make_file_system() { mke2fs -q -t ext4 mnt/disk.raw; }

    copy() {
        (
            cd "$source"
            echo "mkdir $1"
            find . -mindepth 1 -type d -printf "mkdir \"$1/%P\"\n"
            find . -type f -printf "write \"%P\" \"$1/%P\"\n"
        ) >commands
        (cd "$source" && debugfs -w -f "$OLDPWD/commands" "$OLDPWD/mnt/disk.raw") >log 2>&1
        ! grep -v -e '^debugfs' -e '^Allocated inode' log | head -n 3 | grep . || fail 'debugfs complains'
    }

    leave() { :; }

    read_back() {
        mkdir "$2"
        debugfs -R "rdump / $2" "$1" 2>/dev/null
    }
fi

make_images
"$rebasefs" mount --rw cow.qcow2 mnt
make_file_system
rebase_again_and_again &
for ((number = 1; number <= copies; number++)); do
    copy "$number"
done
touch stop
wait $! || fail "a rebase failed: $(grep error mnt/ctl/status)"
leave
e2fsck -fn mnt/disk.raw >log 2>&1 || fail "in the mount: $(cat log)"
"$rebasefs" umount mnt

qemu-img check -q cow.qcow2 || fail 'qemu-img check'
qemu-img convert -O raw cow.qcow2 flat.raw
e2fsck -fn flat.raw >log 2>&1 || fail "in the image: $(cat log)"
read_back flat.raw found
for ((number = 1; number <= copies; number++)); do
    diff -r "$source" "found/$number"
done
qemu-img convert -l snapshot.name=empty -O raw cow.qcow2 empty.raw
cmp one.img empty.raw
sha256sum --quiet --check images
echo "$(cat rebases) rebases under $copies copies of $(find "$source" -type f | wc -l) files, no difference"
