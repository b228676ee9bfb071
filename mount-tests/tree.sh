#!/usr/bin/env bash
# Walks the mounted tree as a user would, with the user's own tools: `tree.sh REBASEFS`, in an empty
# directory, as anybody. Says nothing and succeeds, or says what is wrong.
set -euo pipefail
export LC_ALL=C.UTF-8 PATH="$PATH:/usr/sbin:/sbin"
rebasefs=$1

fail() {
    echo "tree.sh: line ${BASH_LINENO[0]}: $*" >&2
    exit 1
}

# same WHAT EXPECTED: or show both.
same() {
    [[ $1 == "$2" ]] || fail "$(printf 'got\n%s\nexpected\n%s' "$1" "$2")"
}

# same_json A B: whatever the layout.
same_json() {
    same "$(jq -S . "$1")" "$(jq -S . "$2")"
}

# Returns when the server has let go of the image.
unmount() {
    "$rebasefs" umount mnt
}

# Nobody shall find a mount left behind.
trap 'mountpoint -q mnt && { umount -l mnt 2>/dev/null || fusermount3 -uz mnt; }' EXIT

# A chain of three, and three snapshots; one was taken when the disk was smaller.
make_images() {
    qemu-img create -q -f raw base.raw 2M
    qemu-io -f raw -c 'write -q -P 0x11 0 1M' -c 'write -q -P 0x12 1792k 64k' base.raw
    cp base.raw other.raw
    qemu-io -f raw -c 'write -q -P 0x99 256k 640k' other.raw
    qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2
    qemu-io -c 'write -q -P 0x22 512k 256k' -c 'write -q -z 128k 64k' mid.qcow2
    qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 cow.qcow2
    qemu-io -c 'write -q -P 0x33 960k 128k' cow.qcow2
    qemu-img snapshot -c 'before update' cow.qcow2
    qemu-io -c 'write -q -P 0x44 0 192k' cow.qcow2
    qemu-img snapshot -c 'a/b: größer' cow.qcow2
    qemu-img resize -q -f qcow2 cow.qcow2 3M
    qemu-io -c 'write -q -c -P 0x55 2560k 64k' -c 'write -q -z 64k 64k' cow.qcow2
    qemu-img snapshot -c before.update cow.qcow2
    qemu-io -c 'write -q -P 0x66 2M 64k' cow.qcow2
}

# What QEMU says, before the mount and its lock.
ask_qemu() {
    mkdir expected
    qemu-img convert -O raw cow.qcow2 expected/0.raw
    qemu-img convert -O raw mid.qcow2 expected/1.raw
    cp --sparse=always base.raw expected/2.raw
    for number in 1 2 3; do
        qemu-img convert -O raw -l "snapshot.id=$number" cow.qcow2 "expected/snapshot-$number"
    done
    # Of another size than the disk, a snapshot shows what it had.
    truncate -s 2M expected/snapshot-{1,2}
    qemu-img map --output=json "$PWD/cow.qcow2" >expected/map
    qemu-img info --output=json --backing-chain "$PWD/cow.qcow2" >expected/info
}

# Bytes, size, holes and blocks of a file are those of another one.
same_file() {
    cmp "$1" "$2"
    same "$(stat -c %s "$1")" "$(stat -c %s "$2")"
    local data
    data=$(qemu-img map -f raw --output=json "$1" | jq '[.[] | select(.data) | .length] | add // 0')
    same "$(stat -c %b "$1")" $((data / 512))
    cp --sparse=always "$1" sparse.copy
    cmp sparse.copy "$2"
    (($(stat -c %b sparse.copy) <= $(stat -c %b "$1"))) || fail "$1: has holes that are not shown"
    rm sparse.copy
}

snapshots=('before update' 'a%2Fb: größer' before.update)

walk_snapshots() {
    same "$(ls mnt/snapshots)" "$(printf '%s.raw\n' "${snapshots[@]}" | sort)"
    for number in 1 2 3; do
        same_file "mnt/snapshots/${snapshots[number - 1]}.raw" "expected/snapshot-$number"
    done
}

walk_control() {
    same "$(ls mnt/ctl)" "$(printf '%s\n' backing cancel chain difference info map partitions rebase status)"
    same_json mnt/ctl/info expected/info
    # No process has the image open for writing but ours, which has it for good.
    same "$(cat mnt/ctl/map)" "$(cat expected/map)"
    for file in info map partitions status chain backing; do
        cp "mnt/ctl/$file" copy
        cmp copy "mnt/ctl/$file"
        same "$(dd if="mnt/ctl/$file" bs=7 status=none | md5sum)" "$(md5sum <copy)"
        rm -f copy
    done
}

# Whatever one asks for, nobody but who mounted it may change anything.
walk_modes() {
    same "$(find mnt ! -uid "$(id -u)")" ''
    same "$(find mnt -perm /0133 ! -type d)" ''
    same "$(find mnt -type d ! -perm 0555)" ''
    same "$(find mnt -type f -perm -0200 | sort)" "$(printf 'mnt/ctl/%s\n' backing cancel difference rebase)"
    same "$(find mnt -samefile mnt/disk.raw | sort)" "$(printf '%s\n' mnt/disk.raw mnt/layers/0.raw)"
    # find has followed everything to its end, and every name leads somewhere.
    find mnt -type f -exec cat {} + >/dev/null
    for name in layers/3.raw layers/00.raw layers/-1.raw layers/0 snapshots/.raw snapshots/../../x ctl/x; do
        [[ ! -e mnt/$name ]] || fail "$name is there"
    done
}

walk() {
    same "$(ls mnt)" "$(printf '%s\n' ctl disk.raw layers snapshots)"
    same_file mnt/disk.raw expected/0.raw
    same "$(ls mnt/layers)" "$(printf '%s\n' 0.raw 1.raw 2.raw)"
    for layer in 0 1 2; do
        same_file "mnt/layers/$layer.raw" "expected/$layer.raw"
    done
    walk_snapshots
    walk_control
    walk_modes
}

# Disk and snapshots stay what they are; the layers below are others. Who has an old one open keeps it.
rebase() {
    exec 3<mnt/layers/1.raw
    cmp -n 4096 mnt/layers/1.raw expected/1.raw
    echo other.raw >mnt/ctl/backing
    same "$(ls mnt/layers)" "$(printf '%s\n' 0.raw 1.raw)"
    same_file mnt/layers/1.raw other.raw
    same "$(stat -L -c %s /dev/fd/3)" "$(stat -c %s expected/1.raw)"
    cmp /dev/fd/3 expected/1.raw
    exec 3<&-
    same_file mnt/layers/0.raw expected/0.raw
    walk_snapshots
    same "$(jq -r '.[].filename' mnt/ctl/info)" "$(printf '%s\n' "$PWD/cow.qcow2" "$PWD/other.raw")"
}

# Now they all show what the next file holds, also to who has them open.
rebase_unsafely() {
    tr '\0' '\111' <other.raw >moved.raw
    exec 3<'mnt/snapshots/before update.raw'
    cmp -n 65536 -i 1310720 /dev/fd/3 other.raw
    echo '-u -F raw -b moved.raw' >mnt/ctl/rebase
    cmp -n 65536 -i 1310720 /dev/fd/3 moved.raw
    exec 3<&-
    cmp -n 65536 -i 1310720 mnt/disk.raw moved.raw
    cmp mnt/layers/1.raw moved.raw
}

# partitioned IMAGE NUMBER…: the partitions are those that sfdisk sees, as flat files; the last one
# is an ext4 file system.
partitioned() {
    local image=$1 number start size
    shift
    mke2fs -q -t ext4 -d files fs.img 12M >/dev/null
    last=${*: -1}
    sfdisk -J disk.img >expected/table
    read -r start size < <(jq -r ".partitiontable.partitions[-1] | \"\(.start) \(.size)\"" expected/table)
    dd if=fs.img of=disk.img bs=512 seek="$start" conv=notrunc,sparse status=none
    qemu-img convert -O qcow2 disk.img "$image"
    qemu-io -c 'write -q -P 0x77 3M 64k' "$image"
    qemu-img convert -O raw "$image" disk.img
    "$rebasefs" mount "$image" mnt
    same "$(ls mnt/partitions)" "$(printf '%s.raw\n' "$@" | sort)"
    for number; do
        read -r start size < <(jq -r ".partitiontable.partitions[] | select(.node == \"disk.img$number\") |
            \"\(.start) \(.size)\"" expected/table)
        dd if=disk.img of=expected/partition bs=512 skip="$start" count="$size" conv=sparse status=none
        truncate -s $((size * 512)) expected/partition
        same_file "mnt/partitions/$number.raw" expected/partition
        same "$(jq ".[] | select(.number == $number) | .start, .length" mnt/ctl/partitions)" \
            "$(printf '%s\n' $((start * 512)) $((size * 512)))"
    done
    debugfs -R 'cat hello' "mnt/partitions/$last.raw" 2>/dev/null | cmp - files/hello
    # Only root can.
    if ((EUID == 0)); then
        mkdir -p guest
        mount -o ro,loop "mnt/partitions/$last.raw" guest
        cmp guest/hello files/hello
        umount guest
    fi
    [[ ! -e mnt/partitions/4.raw && ! -e mnt/partitions/0.raw ]] || fail 'a partition that is none'
    unmount
}

partitions() {
    mkdir files
    echo world >files/hello
    truncate -s 24M disk.img
    sfdisk -q disk.img <<<'label: gpt
        size=2M, type=U, name="EFI system"
        size=4M, type=S
        type=L, name="größe"'
    partitioned gpt.qcow2 1 2 3
    "$rebasefs" mount gpt.qcow2 mnt
    same "$(jq -r '.[] | .type, .name' mnt/ctl/partitions)" \
        "$(jq -r '.partitiontable.partitions[] | (.type | ascii_downcase), .name // ""' expected/table)"
    unmount
    # Without its first GPT there is still the copy at the end.
    qemu-io -c 'write -q -z 512 1024' gpt.qcow2
    "$rebasefs" mount gpt.qcow2 mnt
    same "$(ls mnt/partitions)" "$(printf '%s.raw\n' 1 2 3)"
    unmount
    rm disk.img
    truncate -s 24M disk.img
    sfdisk -q disk.img <<<'label: dos
        size=2M, type=c
        size=2M, type=82
        type=5
        start=14336, size=1M, type=83
        type=83'
    partitioned mbr.qcow2 1 2 5 6
}

make_images
ask_qemu
mkdir mnt
"$rebasefs" mount cow.qcow2 mnt
walk
rebase
rebase_unsafely
unmount
qemu-img check -q cow.qcow2
partitions
