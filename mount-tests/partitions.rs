//! Partition tables that no tool makes, and some that old ones made: numbers and places are those of
//! libblkid (`partx`), which are the kernel's.

use crate::mounted::Mounted;
use crate::scratch::Scratch;

const SECTOR: usize = 512;

/// Sectors of the disk.
const SECTORS: u64 = 10_000;

/// The sector of a table, and its records: type, first sector, number of sectors.
type Table<'a> = (usize, &'a [(u8, u32, u32)]);

const EXTENDED: u8 = 5;
const LINUX: u8 = 0x83;

fn write_table(disk: &mut [u8], (at, records): Table<'_>) {
    let sector = &mut disk[at * SECTOR..][..SECTOR];
    for (n, (kind, start, length)) in records.iter().enumerate() {
        let record = &mut sector[446 + 16 * n..][..16];
        record[4] = *kind;
        record[8..12].copy_from_slice(&start.to_le_bytes());
        record[12..].copy_from_slice(&length.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
}

/// Number, first sector and number of sectors as libblkid finds them, without containers and what
/// leaves the disk: there are no files for these.
fn of_libblkid(s: &Scratch) -> Vec<[u64; 3]> {
    let listed = s.ok("partx", "-rgo NR,START,SECTORS,TYPE disk.img");
    let partition = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| words[n].parse::<u64>().unwrap();
        let is_there = words[3] != "0x5" && number(1) + number(2) <= SECTORS;
        is_there.then(|| [number(0), number(1), number(2)])
    };
    listed.lines().filter_map(partition).collect()
}

/// The same as the mount has them.
fn ours(s: &Scratch) -> Vec<[u64; 3]> {
    let mounted = Mounted::with(s, "disk.img", "-f raw");
    let said: serde_json::Value = serde_json::from_str(&mounted.says("partitions")).unwrap();
    let number = |of: &serde_json::Value, key: &str| of[key].as_u64().unwrap();
    let partition = |of: &serde_json::Value| {
        let file = mounted.path(&format!("partitions/{}.raw", of["number"]));
        assert_eq!(std::fs::metadata(file).unwrap().len(), number(of, "length"));
        [number(of, "number"), number(of, "start") / SECTOR as u64, number(of, "length") / SECTOR as u64]
    };
    said.as_array().unwrap().iter().map(partition).collect()
}

#[test]
fn logical_partitions_are_found_as_libblkid_finds_them() {
    let container: Table<'_> = (0, &[(EXTENDED, 2000, 6000)]);
    let all: [(&str, &[Table<'_>], usize); 15] = [
        (
            "primary ones beside two logical ones",
            &[
                (0, &[(LINUX, 1, 9), (0, 0, 0), (EXTENDED, 2000, 6000), (0x82, 9000, 10)]),
                (2000, &[(LINUX, 2, 8), (EXTENDED, 3000, 20)]),
                (5000, &[(7, 1, 19)]),
            ],
            4,
        ),
        (
            "four in one table, as OS/2 has it",
            &[container, (2000, &[(LINUX, 1, 9), (LINUX, 10, 9), (LINUX, 20, 9), (LINUX, 30, 9)])],
            4,
        ),
        (
            "partitions after the one that leads on",
            &[
                container,
                (2000, &[(LINUX, 1, 9), (EXTENDED, 100, 50), (LINUX, 20, 9), (LINUX, 30, 9)]),
                (2100, &[(LINUX, 1, 9), (0, 0, 0), (LINUX, 10, 9), (LINUX, 200, 9)]),
            ],
            5,
        ),
        (
            "the first record leads on, as DR-DOS has it",
            &[container, (2000, &[(EXTENDED, 100, 50), (LINUX, 1, 9)]), (2100, &[(LINUX, 1, 9)])],
            2,
        ),
        (
            "tables without a partition",
            &[
                container,
                (2000, &[(0, 0, 0), (EXTENDED, 100, 50)]),
                (2100, &[(0, 0, 0), (EXTENDED, 300, 60)]),
                (2300, &[(LINUX, 1, 9)]),
            ],
            1,
        ),
        (
            "partitions of type 0",
            &[
                (0, &[(0, 10, 9), (EXTENDED, 2000, 6000)]),
                (2000, &[(0, 1, 9), (EXTENDED, 100, 50)]),
                (2100, &[(LINUX, 1, 9)]),
            ],
            3,
        ),
        (
            "a loop of two",
            &[
                container,
                (2000, &[(LINUX, 1, 9), (EXTENDED, 100, 50)]),
                (2100, &[(LINUX, 1, 9), (EXTENDED, 0, 50)]),
            ],
            2,
        ),
        ("a loop of one", &[container, (2000, &[(LINUX, 1, 9), (EXTENDED, 0, 50)])], 1),
        (
            "a table outside of the container",
            &[
                (0, &[(EXTENDED, 2000, 1000)]),
                (2000, &[(LINUX, 1, 9), (EXTENDED, 3000, 50)]),
                (5000, &[(LINUX, 1, 9)]),
            ],
            2,
        ),
        (
            "a partition that leaves its container",
            &[
                (0, &[(EXTENDED, 2000, 1000)]),
                (2000, &[(LINUX, 1, 3000), (EXTENDED, 100, 50)]),
                (2100, &[(LINUX, 1, 9)]),
            ],
            2,
        ),
        (
            "garbage in the third record",
            &[
                (0, &[(EXTENDED, 2000, 1000)]),
                (2000, &[(LINUX, 1, 9), (0, 0, 0), (LINUX, 990, 20), (LINUX, 20, 20)]),
            ],
            2,
        ),
        (
            "two containers",
            &[
                (0, &[(EXTENDED, 2000, 1000), (EXTENDED, 4000, 1000)]),
                (2000, &[(LINUX, 1, 9)]),
                (4000, &[(LINUX, 1, 9)]),
            ],
            2,
        ),
        (
            "the same partition in two tables",
            &[
                container,
                (2000, &[(LINUX, 100, 9), (EXTENDED, 50, 200)]),
                (2050, &[(LINUX, 50, 9), (LINUX, 60, 9)]),
            ],
            2,
        ),
        (
            "two records that lead on",
            &[
                container,
                (2000, &[(LINUX, 1, 9), (EXTENDED, 100, 50), (EXTENDED, 200, 50)]),
                (2100, &[(LINUX, 1, 9)]),
                (2200, &[(LINUX, 1, 9)]),
            ],
            2,
        ),
        (
            "one that leaves the disk has a number",
            &[container, (2000, &[(LINUX, 1, 90_000), (EXTENDED, 100, 50)]), (2100, &[(LINUX, 1, 9)])],
            1,
        ),
    ];
    let s = Scratch::new();
    for (what, tables, count) in all {
        let mut disk = vec![0; SECTORS as usize * SECTOR];
        tables.iter().for_each(|table| write_table(&mut disk, *table));
        s.write("disk.img", &disk);
        let expected = of_libblkid(&s);
        assert_eq!((ours(&s), count), (expected.clone(), expected.len()), "{what}");
    }
}

/// The MBR before a GPT may name some of its partitions again, for systems that know no GPT.
#[test]
fn a_gpt_counts_where_the_mbr_has_partitions_too() {
    let s = Scratch::new();
    let protective = 0xee;
    for records in [
        [(protective, 1, 2047), (LINUX, 4096, 1024), (0, 0, 0), (0, 0, 0)],
        [(LINUX, 4096, 1024), (0x0c, 2048, 1024), (protective, 1, 2047), (0, 0, 0)],
    ] {
        s.write("disk.img", &vec![0; SECTORS as usize * SECTOR]);
        s.write("layout", b"label: gpt\nstart=2048,size=1024\nstart=4096,size=1024\nstart=6144,size=512\n");
        s.ok("bash", "-c sfdisk${IFS}-q${IFS}disk.img<layout");
        let mut disk = std::fs::read(s.path("disk.img")).unwrap();
        write_table(&mut disk, (0, &records));
        s.write("disk.img", &disk);
        assert_eq!(of_libblkid(&s), [[1, 2048, 1024], [2, 4096, 1024], [3, 6144, 512]]);
        assert_eq!(ours(&s), of_libblkid(&s));
    }
}
