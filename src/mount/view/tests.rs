use std::path::Path;
use std::sync::mpsc::channel;

use super::*;
use crate::chain::Opener;
use crate::file::Access;
use crate::mount::settings::Settings;

const NOBODY: Writer = Writer { thread: 0, files: None };

/// The view of a raw disk of 1 MiB, which no engine can rebase.
fn view(dir: &Path) -> View {
    let path = dir.join("disk");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let chain = Opener::new().chain(&path, None, Access::ReadWrite).unwrap();
    let image = Arc::new(Image::new(chain));
    let control = Arc::new(Control::new(image.clone(), None));
    control.start(Opener::new(), |_| {});
    let ownership = Ownership { user: 1, group: 2, modified: SystemTime::UNIX_EPOCH };
    View::new(image, control, ownership, Writing::Refused)
}

fn find(view: &View, path: &[&str]) -> Attributes {
    let root = view.attributes(Inode::ROOT).unwrap();
    path.iter().fold(root, |parent, name| view.lookup(parent.inode, name.as_ref()).unwrap())
}

/// Opens a control file, writes to it, closes it; returns the answers to both.
fn write(view: &View, file: &str, bytes: &[u8]) -> [Result<(), i32>; 2] {
    let inode = find(view, &["ctl", file]).inode;
    let (handle, pages) = view.open(inode, Some(0)).unwrap();
    assert_eq!(pages, Pages::None);
    let (sender, answers) = channel();
    let closed = sender.clone();
    view.write((inode, handle), 0, bytes, (NOBODY, false), move |answer| {
        sender.send(answer.map(drop)).unwrap();
    });
    let written = answers.recv().unwrap();
    view.flush(handle, NOBODY, Box::new(move |answer| closed.send(answer).unwrap()));
    view.release(handle);
    [written, answers.recv().unwrap()]
}

fn text(view: &View, file: &str) -> String {
    let inode = find(view, &["ctl", file]).inode;
    let (handle, _) = view.open(inode, None).unwrap();
    let mut buffer = [0; 4096];
    let length = view.read(inode, handle, 0, &mut buffer).unwrap();
    assert_eq!(view.read(inode, handle, length as u64, &mut buffer[length..]).unwrap(), 0);
    view.release(handle);
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn the_disk_is_a_file_that_keeps_its_pages() {
    let dir = tempfile::tempdir().unwrap();
    let view = view(dir.path());
    let disk = find(&view, &["disk.raw"]);
    assert_eq!((disk.size, disk.blocks, disk.permissions), (1 << 20, 2048, 0o444));
    assert_eq!(view.open(disk.inode, None).unwrap(), (0, Pages::Kept));
    let mut buffer = [0; 4];
    assert_eq!(view.read(disk.inode, 0, (1 << 20) - 2, &mut buffer).unwrap(), 2);
    assert_eq!(buffer, [7, 7, 0, 0]);
}

#[test]
fn the_answer_to_a_write_is_what_came_of_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let view = view(dir.path());
    let unsupported = Err(ErrorKind::Unsupported.errno());
    assert_eq!(write(&view, "backing", b"other\n"), [unsupported, Ok(())]);
    assert_eq!(write(&view, "backing", b"other"), [Ok(()), unsupported]);
    assert_eq!(write(&view, "cancel", b"\n"), [Ok(()), Ok(())]);
    let status = text(&view, "status");
    assert!(status.starts_with("state: failed\nbacking:\nrequest: rebase onto 'other'\nerror: "), "{status}");
}

#[test]
fn each_opening_for_writing_gives_a_control_file_another_inode() {
    let dir = tempfile::tempdir().unwrap();
    let view = view(dir.path());
    let before = find(&view, &["ctl", "backing"]);
    let _ = write(&view, "backing", b"other\n");
    let after = find(&view, &["ctl", "backing"]);
    assert_ne!(before.inode, after.inode);
    assert_eq!((before.name_valid, after.size), (Duration::ZERO, 0));
    // Who holds the old one can go on with it.
    assert_eq!(view.attributes(before.inode).unwrap(), before);
    let emptied = Settings { size: Some(0), ..Settings::default() };
    assert_eq!(view.set_attributes(before.inode, &emptied).unwrap(), before);
    // A second writer shall not have to wait for the first.
    let (handle, _) = view.open(after.inode, Some(0)).unwrap();
    assert_eq!(view.attributes(after.inode).unwrap().size, PAGE);
    let next = find(&view, &["ctl", "backing"]);
    assert_ne!(next.inode, after.inode);
    assert_eq!(next.size, 0);
    view.release(handle);
}

#[test]
fn what_does_not_exist_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let view = view(dir.path());
    let errno = |error: Error| error.errno();
    assert_eq!(view.lookup(Inode::ROOT, "x".as_ref()).map_err(errno).unwrap_err(), 2);
    assert!(view.attributes(Inode(99)).is_err() && view.list(Inode::DISK, 0).is_err());
    assert!(view.open(Inode::ROOT, None).is_err() && view.open(Inode::DISK, Some(0)).is_err());
    assert!(view.read(find(&view, &["ctl", "status"]).inode, 77, 0, &mut [0]).is_err());
    assert_eq!(view.list(Inode::ROOT, 0).unwrap().len(), 6);
}

#[test]
fn a_closed_mount_takes_no_commands() {
    let dir = tempfile::tempdir().unwrap();
    let view = view(dir.path());
    view.control.close();
    assert_eq!(write(&view, "backing", b"other\n")[0], Err(ErrorKind::Busy.errno()));
    assert!(text(&view, "status").contains("refused: the mount is being taken down"));
}
