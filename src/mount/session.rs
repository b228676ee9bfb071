//! The life of a mount: make it, wait until somebody ends it, take it down and let what runs stop
//! cleanly.

use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use fuser::{Config, INodeNo, Notifier, Session, SessionUnmounter};

use super::adapter::Adapter;
use super::control::{Bytes, Control};
use super::image::Image;
use super::parting::Listening;
use super::tree::{Inode, Node};
use super::view::View;
use crate::chain::{Opener, announce, mounted_at};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, StopSignals, signal};

/// How far the kernel reads ahead of a sequential reader, in KiB. Its own default is 128.
const READ_AHEAD: u32 = 1024;

/// After the mount is gone, threads get so long to notice.
const FAREWELL: Duration = Duration::from_secs(2);

/// How often to look whether somebody has changed a backing file, and to make durable what was written and
/// never synced.
const LOOK: Duration = Duration::from_secs(5);

/// Why a mount ends.
enum End {
    /// This signal came.
    Signal(i32),
    /// The kernel has let go of it: `umount`, or its connection was aborted.
    Gone(io::Result<()>),
}

/// A mount that stands.
pub(super) struct Mounted {
    mountpoint: PathBuf,
    image: Arc<Image>,
    control: Arc<Control>,
    unmounter: SessionUnmounter,
    ends: Receiver<End>,
    /// Where those who unmount it wait.
    listening: Option<Listening>,
    /// What to do on SIGHUP.
    hung_up: Box<dyn FnMut() -> ControlFlow<()> + Send>,
    /// Tells other processes that this one serves the mount.
    _mark: Option<File>,
}

/// Mounts `view` on the real path `mountpoint` and lets it be used.
pub(super) fn mount(
    view: View,
    image: Arc<Image>,
    control: Arc<Control>,
    opener: Opener,
    mountpoint: PathBuf,
    config: &Config,
) -> Result<Mounted> {
    // Before the first thread starts, so that all have them blocked.
    let signals = StopSignals::block().map_err(|e| Error::io(e, "cannot block signals"))?;
    let mut session =
        Session::new(Adapter(view), &mountpoint, config).map_err(|e| cannot_mount(e, &mountpoint))?;
    let unmounter = session.unmount_callable();
    let notifier = session.notifier();
    // Before anybody can use it: whoever opens a file of it wants to know what that stands on.
    let mark = announced(&mountpoint, &image);
    let (sender, ends) = channel();
    start("serve", {
        let sender = sender.clone();
        move || drop(sender.send(End::Gone(session.run())))
    })?;
    start("signals", move || wait_for_signals(&signals, &sender))?;
    // Our own mount can be looked at only now that others serve it.
    let device = std::fs::metadata(&mountpoint)
        .map_err(|e| Error::io(e, "cannot stat the mount").path(&mountpoint))?;
    read_ahead(device.dev());
    control.start(opener.forbid_device(device.dev()), {
        let image = image.clone();
        move |bytes| forget(&notifier, &image, bytes)
    });
    let listening = Listening::start(device.dev(), Arc::downgrade(&control));
    let listening = listening.inspect_err(|e| log::debug!("whoever unmounts cannot ask us: {e}")).ok();
    let hung_up = Box::new(|| ControlFlow::Continue(()));
    Ok(Mounted { mountpoint, image, control, unmounter, ends, listening, hung_up, _mark: mark })
}

fn announced(mountpoint: &Path, image: &Image) -> Option<File> {
    let device = mounted_at(mountpoint)?;
    let top = image.chain().top()?.file().identity();
    announce(device, top).inspect_err(|e| log::warn!("others cannot see what is mounted: {e}")).ok()
}

impl Mounted {
    /// Does this on SIGHUP: the mount ends with `Break`.
    pub(super) fn on_hangup(self, hung_up: Box<dyn FnMut() -> ControlFlow<()> + Send>) -> Self {
        Self { hung_up, ..self }
    }

    /// Serves until `umount` or a signal, then takes the mount down.
    pub(super) fn serve(mut self) -> Result<()> {
        let end = loop {
            match self.ends.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => self.look_around(),
                Ok(End::Signal(signal::SIGHUP)) if (self.hung_up)().is_continue() => {}
                end => break end,
            }
        };
        self.finish(|mounted| mounted.end(end))
    }

    /// Takes the mount down.
    pub(super) fn unmount(self) -> Result<()> {
        self.finish(Self::take_down)
    }

    fn finish(mut self, end: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.control.close();
        let ended = end(&mut self);
        // Nobody can write any more.
        let flushed = self.image.flush().doing(|| "making durable what was written".to_owned());
        let result = ended.and(flushed);
        let listening = self.listening.take();
        // Whoever has waited finds the image free.
        drop(self);
        if let Some(listening) = listening {
            listening.end(&result);
        }
        result
    }

    fn look_around(&self) {
        // Who never looks into ctl/status finds it in the log.
        drop(self.control.look_at_backing_files());
        if let Err(e) = self.image.flush_changes() {
            log::error!("making durable what was written: {e}");
        }
    }

    fn end(&mut self, end: Result<End, RecvTimeoutError>) -> Result<()> {
        match end {
            Ok(End::Gone(result)) => {
                result.map_err(|e| Error::io(e, "serving the mount").path(&self.mountpoint))
            }
            Ok(End::Signal(signal)) => {
                log::info!("signal {signal}: unmounting {}", self.mountpoint.display());
                self.take_down()
            }
            Err(_) => Ok(()),
        }
    }

    fn take_down(&mut self) -> Result<()> {
        match self.unmounter.unmount() {
            Ok(()) => {}
            // In use: nobody finds it any more, and who holds a file in it gets errors from it.
            Err(_) => {
                let detached = sys::detach_mount(&self.mountpoint);
                detached.map_err(|e| Error::io(e, "cannot unmount").path(&self.mountpoint))?;
            }
        }
        // Another name space or an open file can hold the mount for ever; we do not wait for that.
        while let Ok(end) = self.ends.recv_timeout(FAREWELL) {
            if matches!(end, End::Gone(_)) {
                break;
            }
        }
        Ok(())
    }
}

fn wait_for_signals(signals: &StopSignals, ends: &Sender<End>) {
    while ends.send(End::Signal(signals.wait())).is_ok() {}
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|e| Error::io(e, "cannot start a thread"))
}

/// Where the holes of the disk and of its parts are can change whenever it has another chain; the
/// kernel drops the data too if they are others. Layers have another inode each time. Not to be called
/// by a thread that serves: the kernel waits for pages that are being read.
fn forget(notifier: &Notifier, image: &Image, bytes: Bytes) {
    let (attributes_only, from_the_beginning, to_the_end) = (-1, 0, 0);
    let offset = match bytes {
        Bytes::Same => attributes_only,
        Bytes::Others => from_the_beginning,
    };
    let no_incarnation = 0;
    let parts = image.viewed().into_iter().map(|part| Node::Part(part).inode(no_incarnation));
    for inode in std::iter::once(Inode::DISK).chain(parts) {
        if let Err(e) = notifier.inval_inode(INodeNo(inode.0), offset, to_the_end) {
            log::debug!("the kernel does not know inode {:#x}: {e}", inode.0);
        }
    }
}

/// Lets the kernel read further ahead; only root can, and nothing is lost if not.
fn read_ahead(device: u64) {
    let (major, minor) = sys::device_numbers(device);
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    let written = File::options().write(true).open(&path).and_then(|mut file| write!(file, "{READ_AHEAD}"));
    if let Err(e) = written {
        log::debug!("{path}: {e}");
    }
}

/// Whether the mode of a file forbids us to read and write it.
fn is_for_others(path: &str) -> bool {
    let opened = File::options().read(true).write(true).open(path);
    opened.is_err_and(|e| e.raw_os_error() == Some(sys::errno::EACCES))
}

fn cannot_mount(error: io::Error, mountpoint: &Path) -> Error {
    let hint = if !Path::new("/dev/fuse").exists() {
        Some("there is no /dev/fuse: `modprobe fuse` makes it; a container needs to be given it")
    } else if error.kind() == io::ErrorKind::NotFound {
        Some("only root can mount without fusermount3: install the package fuse3")
    } else if error.to_string().contains("user_allow_other") {
        Some("root allows it with `echo user_allow_other >> /etc/fuse.conf`")
    } else if is_for_others("/dev/fuse") {
        Some("root lets everybody use it with `chmod 666 /dev/fuse`")
    } else {
        None
    };
    let error = match error.raw_os_error() {
        Some(_) => Error::io(error, "cannot mount"),
        // fusermount3's own words, which end with a newline.
        None => {
            Error::new(ErrorKind::PermissionDenied, format!("cannot mount: {}", error.to_string().trim()))
        }
    };
    let error = error.path(mountpoint);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
