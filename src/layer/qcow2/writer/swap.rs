//! The header swap: the one write that lets the overlay name another backing file (invariant I3).
//!
//! Owns the layout of the header cluster: header, extensions, backing file name. Everything beyond
//! the first 512-byte sector is put in place while the old header does not look there; then that
//! sector is written in one go. Computing the steps is pure; [`swap`] carries them out.
//!
//! Where the extensions reach into the second sector and would have to move, there is no such
//! place. Then the first sector leads around: an extension of our own type, which other programs
//! skip, spans the old ones, and a copy of these lies behind it. A second swap of the same kind
//! puts everything back in order.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::{HostFile, HostOffset};
use crate::layer::Reference;
use crate::layer::qcow2::Preamble;
use crate::layer::qcow2::extension::{Extension, Extensions, kind};
use crate::layer::qcow2::header::{Header, MAX_BACKING_NAME, autoclear};

/// What a disk writes as a whole or not at all.
const SECTOR: usize = 512;

/// The last header field that we understand ends here.
const COMPRESSION_END: usize = 105;

/// Type of the extension that spans what is not to be looked at; its data has no meaning.
const DETOUR: u32 = 0x5242_4653;

/// Refuses what [`swap`] would refuse, without writing.
pub(super) fn check(file: &dyn HostFile, backing: Option<&Reference>) -> Result<()> {
    steps(file, backing).map(drop)
}

/// Lets the header name `backing`, and returns when that is durable.
pub(super) fn swap(file: &dyn HostFile, backing: Option<&Reference>) -> Result<()> {
    for step in steps(file, backing)? {
        for range in differences(&step.before, &step.after) {
            file.write_at(HostOffset(range.start as u64), &step.after[range])?;
        }
        file.sync()?;
        file.write_at(HostOffset(0), &step.after[..SECTOR])?;
        file.sync()?;
    }
    Ok(())
}

/// One swap: the header cluster before and after, as long as it is of interest. What differs
/// beyond the first sector may be written first, in any order, torn or not: nobody looks there.
struct Step {
    before: Vec<u8>,
    after: Vec<u8>,
}

/// Ranges beyond the first sector in which the two differ, in whole sectors.
fn differences(before: &[u8], after: &[u8]) -> Vec<Range<usize>> {
    let sectors = (SECTOR..after.len()).step_by(SECTOR).map(|start| start..(start + SECTOR).min(after.len()));
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for sector in sectors.filter(|sector| before[sector.clone()] != after[sector.clone()]) {
        match ranges.last_mut() {
            Some(last) if last.end == sector.start => last.end = sector.end,
            _ => ranges.push(sector),
        }
    }
    ranges
}

fn steps(file: &dyn HostFile, backing: Option<&Reference>) -> Result<Vec<Step>> {
    let doing = || match backing {
        Some(backing) => format!("naming '{}' as backing file", backing.name.display()),
        None => "removing the backing file".to_owned(),
    };
    let preamble = Preamble::read(file).doing(doing)?;
    let mut cluster = vec![0; preamble.header.cluster_size() as usize];
    file.read_at(HostOffset(0), &mut cluster)?;
    compute(&preamble, cluster, backing).path(file.path()).doing(doing)
}

/// What must not be touched outside of the first sector, because a header leads there.
struct Live(Vec<Range<usize>>);

impl Live {
    fn overlaps(&self, range: &Range<usize>) -> bool {
        self.0.iter().any(|live| {
            let live = live.start.max(SECTOR)..live.end;
            live.start < range.end && range.start < live.end
        })
    }

    fn name(header: &Header) -> Range<usize> {
        let start = header.backing_offset as usize;
        start..start + header.backing_size as usize
    }
}

fn compute(preamble: &Preamble, cluster: Vec<u8>, backing: Option<&Reference>) -> Result<Vec<Step>> {
    let name = backing.map_or(OsStr::new(""), |backing| &backing.name).as_bytes();
    if name.len() > MAX_BACKING_NAME {
        let what = format!("the name has {} bytes, {MAX_BACKING_NAME} are possible", name.len());
        return Err(Error::new(ErrorKind::NameTooLong, what).hint("a relative or a shorter path would do"));
    }
    let mut extensions = preamble.extensions.clone();
    extensions.0.retain(|extension| extension.kind != DETOUR);
    let format = backing.and_then(|backing| backing.format.as_deref());
    extensions.set(kind::BACKING_FORMAT, format.map(str::as_bytes));
    let header =
        Header { autoclear: preamble.header.autoclear & autoclear::KNOWN, ..preamble.header.clone() };

    let live = live_now(preamble);
    if let Some(after) = straight(&header, &extensions, name, &cluster, &live) {
        return Ok(vec![Step { before: cluster, after }]);
    }
    let first = detour(&header, &extensions, name, &cluster, &live).ok_or_else(|| no_room(&header, name))?;
    let (after, header, live) = first;
    // Back in order, with the name where it is now. If there is no room for that, the detour stays.
    let second = put_back(&header, &extensions, &after, &live);
    let mut steps = vec![Step { before: cluster, after: after.clone() }];
    steps.extend(second.map(|straightened| Step { before: after, after: straightened }));
    Ok(steps)
}

fn no_room(header: &Header, name: &[u8]) -> Error {
    let what = format!(
        "the header cluster of {} bytes has no room for a name of {} bytes beside what it holds now",
        header.cluster_size(),
        name.len()
    );
    Error::new(ErrorKind::NoSpace, what).hint("a relative or a shorter path may do")
}

/// What the header in the file leads to.
fn live_now(preamble: &Preamble) -> Live {
    let header = &preamble.header;
    let start = header.length as usize;
    let end = start + preamble.extensions.encode().len();
    Live(vec![0..end, Live::name(header)])
}

/// The cluster with header, extensions and name one after the other, if everything beyond the
/// first sector can be written while the old header is in force.
fn straight(
    header: &Header,
    extensions: &Extensions,
    name: &[u8],
    cluster: &[u8],
    live: &Live,
) -> Option<Vec<u8>> {
    let area = extensions.encode();
    let end = header.length as usize + area.len();
    let name_at = place_name(name, end, cluster.len(), live)?;
    let header = with_name(header, name_at, name);
    let mut after = cluster.to_vec();
    put(&mut after, 0, known_bytes(&header.encode()))?;
    put(&mut after, header.length as usize, &area)?;
    put(&mut after, name_at, name)?;
    is_hidden(cluster, &after, live).then_some(after)
}

/// The cluster with a detour around the extensions that are in the file now.
fn detour(
    header: &Header,
    extensions: &Extensions,
    name: &[u8],
    cluster: &[u8],
    live: &Live,
) -> Option<(Vec<u8>, Header, Live)> {
    let start = header.length as usize;
    let straight_end = start + extensions.encode().len();
    let live_end = live.0.iter().map(|range| range.end).max().unwrap_or(0);
    let copy_at = straight_end.max(live_end).max(SECTOR).next_multiple_of(8);
    // As many extensions as fit into the first sector together with the head of the detour.
    let fitting =
        (0..=extensions.0.len()).rev().find(|&n| start + encoded(&extensions.0[..n]).len() + 8 <= SECTOR)?;
    let (near, far) = extensions.0.split_at(fitting);
    let near = encoded(near);
    let detour_at = start + near.len();
    let far = Extensions(far.to_vec()).encode();
    let end = copy_at + far.len();
    let name_at = place_name(name, end, cluster.len(), live)?;
    let header = with_name(header, name_at, name);

    let mut after = cluster.to_vec();
    put(&mut after, 0, known_bytes(&header.encode()))?;
    put(&mut after, start, &near)?;
    put(&mut after, detour_at, &DETOUR.to_be_bytes())?;
    put(&mut after, detour_at + 4, &((copy_at - detour_at - 8) as u32).to_be_bytes())?;
    put(&mut after, copy_at, &far)?;
    put(&mut after, name_at, name)?;
    let lives = Live(vec![0..detour_at + 8, copy_at..end, name_at..name_at + name.len()]);
    is_hidden(cluster, &after, live).then_some((after, header, lives))
}

/// The cluster without the detour.
fn put_back(header: &Header, extensions: &Extensions, cluster: &[u8], live: &Live) -> Option<Vec<u8>> {
    let mut after = cluster.to_vec();
    put(&mut after, header.length as usize, &extensions.encode())?;
    is_hidden(cluster, &after, live).then_some(after)
}

/// Whether all that changes beyond the first sector lies where nobody looks yet.
fn is_hidden(before: &[u8], after: &[u8], live: &Live) -> bool {
    let changed = |i: &usize| before[*i] != after[*i];
    !(SECTOR..after.len()).filter(changed).any(|i| live.overlaps(&(i..i + 1)))
}

/// Where the name can lie: behind the extensions, as near as what is in use allows.
fn place_name(name: &[u8], end: usize, cluster_size: usize, live: &Live) -> Option<usize> {
    let candidates = std::iter::once(end).chain(live.0.iter().map(|range| range.end.next_multiple_of(8)));
    let fits =
        |at: &usize| *at >= end && at + name.len() <= cluster_size && !live.overlaps(&(*at..at + name.len()));
    candidates.filter(fits).min()
}

fn with_name(header: &Header, at: usize, name: &[u8]) -> Header {
    let backing_offset = if name.is_empty() { 0 } else { at as u64 };
    // At most MAX_BACKING_NAME bytes.
    Header { backing_offset, backing_size: name.len() as u32, ..header.clone() }
}

/// Of an encoded header what we understand: a longer one keeps what follows.
fn known_bytes(header: &[u8]) -> &[u8] {
    &header[..header.len().min(COMPRESSION_END)]
}

/// Extensions without end marker.
fn encoded(extensions: &[Extension]) -> Vec<u8> {
    let mut bytes = Extensions(extensions.to_vec()).encode();
    bytes.truncate(bytes.len() - 8);
    bytes
}

fn put(cluster: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    cluster.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
    Some(())
}
