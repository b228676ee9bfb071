//! Control files: bytes written to one → a command → a job on a worker thread, whose end is the
//! answer to the write; and what can be read from one.
//!
//! Knows the image and the rebase engine, but neither inodes nor fuser. One job at a time.

mod backing_files;
mod changes;
mod command;
mod job;
mod map;
mod report;
mod told;
mod words;
mod writer;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use super::image::Image;
use super::times::Moved;
use super::tree::ControlFile;
use crate::chain::{Change, Opener};
use crate::error::{Error, ErrorKind, Result};
use crate::rebase::{Progress, Report};
use backing_files::BackingFiles;
use changes::Changes;
pub(super) use changes::Waker;
pub use command::in_words;
use command::{Command, Line, Task};
use map::MapText;
use told::Told;
pub(super) use writer::Writer;

/// Gets what comes of a write: nothing, or an errno, the words to which are in `ctl/status`. May
/// be called much later, from another thread.
pub(super) type Answer = Box<dyn FnOnce(Result<(), i32>) + Send>;

/// What all control files of a mount have in common.
pub(super) struct Control {
    image: Arc<Image>,
    /// Why the image cannot be written, if so.
    read_only: Option<Error>,
    /// Set once the mount stands; there are no jobs before that.
    mounted: OnceLock<Mounted>,
    state: Mutex<State>,
    backing_files: Arc<BackingFiles>,
    told: Mutex<Told>,
}

/// What is known only when the mount stands.
struct Mounted {
    /// Opens new chains, and refuses files of our own mount.
    opener: Opener,
    /// Called when the image has another chain.
    replaced: Box<dyn Fn(Bytes) + Send + Sync>,
}

/// What a guest sees of an image that has another chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    /// What it saw before (invariant I1).
    Same,
    /// Whatever the new backing file holds: it was not compared.
    Others,
}

#[derive(Default)]
struct State {
    running: Option<Arc<Running>>,
    worker: Option<JoinHandle<()>>,
    last: Option<Outcome>,
    /// What the last dry run found, as text: what `ctl/rebase` reads as.
    rehearsed: Found,
    /// The same of the last comparison, and `ctl/difference`.
    compared: Found,
    /// Why a command was turned away while another ran.
    refused: Option<String>,
    changes: Changes,
    is_closed: bool,
}

/// What somebody has asked for, as text, and when it was found.
#[derive(Default)]
struct Found {
    text: Arc<[u8]>,
    moved: Moved,
}

impl Found {
    fn set(&mut self, text: Vec<u8>) {
        (self.text, self.moved) = (text.into(), self.moved.now());
    }
}

struct Running {
    command: Command,
    progress: Progress,
}

/// What came of a command.
struct Outcome {
    /// The job as it ended; `None` if what was asked for could not be understood.
    asked: Option<Arc<Running>>,
    result: Result<Done>,
}

/// What a job that succeeded has done.
#[derive(Clone, Copy, Debug)]
enum Done {
    /// It rebased, or found out what a rebase would do.
    Rebased(Report),
    /// It found so many bytes in which backing files differ.
    Compared(u64),
}

/// One opening of a control file: what was written to it, and what is being read from it.
#[derive(Debug)]
pub(super) struct Opened {
    file: ControlFile,
    line: Line,
    /// Who wrote what the line has so far.
    writer: Option<Writer>,
    text: Option<Vec<u8>>,
    map: MapText,
    /// The last change of the state that was read of, if anything was read.
    seen: Option<u64>,
    /// The last text whose size somebody was told before it was read here.
    told: u64,
}

impl Opened {
    pub(super) fn new(file: ControlFile) -> Self {
        Self {
            file,
            line: Line::default(),
            writer: None,
            text: None,
            map: MapText::default(),
            seen: None,
            told: 0,
        }
    }

    /// What a line that was written to it asks for.
    fn command(&self, line: Vec<u8>) -> Result<Command> {
        match self.file {
            ControlFile::Difference => Command::difference(line),
            ControlFile::Rebase => Command::rebase(&line),
            _ => Command::backing(line),
        }
    }
}

impl Control {
    /// The control files of `image`, which was opened for reading only because of `read_only`.
    pub(super) fn new(image: Arc<Image>, read_only: Option<Error>) -> Self {
        Self {
            image,
            read_only,
            mounted: OnceLock::new(),
            state: Mutex::default(),
            backing_files: Arc::default(),
            told: Mutex::default(),
        }
    }

    /// Lets jobs run from now on: `opener` opens their files, `replaced` is called whenever the
    /// image has another chain.
    pub(super) fn start(&self, opener: Opener, replaced: impl Fn(Bytes) + Send + Sync + 'static) {
        let mounted = Mounted { opener, replaced: Box::new(replaced) };
        assert!(self.mounted.set(mounted).is_ok(), "a mount is made once");
    }

    /// Stops the running job, waits for it to end, and accepts no other.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        if let Some(running) = &state.running {
            running.progress.cancel();
        }
        let worker = state.worker.take();
        drop(state);
        // A worker that panicked has nothing more to say than its message.
        worker.map(JoinHandle::join);
    }

    /// Lets the kernel forget what it has cached of the disk, which is another one where nobody wrote
    /// through the kernel. Not to be called by a thread that serves.
    pub(super) fn forget_pages(&self) {
        if let Some(mounted) = self.mounted.get() {
            (mounted.replaced)(Bytes::Others);
        }
    }

    /// Whether the image can be written.
    pub(super) fn is_writable(&self) -> bool {
        self.read_only.is_none()
    }

    /// Fills `buffer` from `offset` on with what the file says; from its beginning, with what it
    /// says now.
    pub(super) fn read(&self, opened: &mut Opened, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        if opened.file == ControlFile::Map {
            let map = &mut opened.map;
            return self.image.with_chain(|chain| map.read(chain, offset, buffer));
        }
        if offset == 0 {
            let change = self.state().changes.number();
            opened.seen = Some(change);
            opened.text = self.told().text(opened.file, change, &mut opened.told);
        }
        let text = match &mut opened.text {
            Some(text) => text,
            none => {
                let (text, change) = self.text(opened.file)?;
                opened.seen = Some(change);
                none.insert(text)
            }
        };
        let start = usize::try_from(offset).map_or(text.len(), |offset| offset.min(text.len()));
        let length = buffer.len().min(text.len() - start);
        buffer[..length].copy_from_slice(&text[start..start + length]);
        Ok(length)
    }

    /// What a file says, and the change of the state that it tells of.
    fn text(&self, file: ControlFile) -> Result<(Vec<u8>, u64)> {
        let mut change = self.state().changes.number();
        let chain = self.image.chain();
        let text = match file {
            ControlFile::Backing => report::backing(&chain),
            ControlFile::Chain => report::chain(&chain),
            ControlFile::Info => report::info(&chain)?,
            ControlFile::Partitions => report::partitions(&self.image.partitions()?)?,
            ControlFile::Status => {
                let changes = self.look_at_backing_files();
                let state = self.state();
                // Who has read of a change is not woken for it.
                change = state.changes.number();
                let mut status = report::status(
                    &chain,
                    &changes,
                    state.running.as_deref(),
                    state.last.as_ref(),
                    state.refused.as_deref(),
                );
                // Who unmounts can wait for it.
                status.extend(format!("server: {}\n", std::process::id()).into_bytes());
                status
            }
            ControlFile::Difference | ControlFile::Rebase => self.found(file).to_vec(),
            ControlFile::Cancel | ControlFile::Map => Vec::new(),
        };
        Ok((text, change))
    }

    /// Whether there is anything to read that was not read yet. If not, `waker` is called when there is.
    /// Only `ctl/status` has something new, each time another state begins.
    pub(super) fn poll(&self, opened: &Opened, opening: u64, waker: Option<Waker>) -> bool {
        opened.file != ControlFile::Status || self.state().changes.is_after(opened.seen, opening, waker)
    }

    /// An opening is closed.
    pub(super) fn release(&self, opening: u64) {
        self.state().changes.forget(opening);
    }

    /// What has changed of the backing files since the chain was opened; it goes to the log too, once.
    pub(super) fn look_at_backing_files(&self) -> Vec<Change> {
        self.backing_files.look(self.image.watch())
    }

    /// How many bytes there are to read from a file now; what is read next is as long as this. 0 where
    /// that takes long to find out, as `/proc` has it, and where it cannot be read.
    pub(super) fn size(&self, file: ControlFile) -> u64 {
        if file == ControlFile::Map {
            return self.image.text_length(map::length).unwrap_or(0);
        }
        let Ok((text, change)) = self.text(file) else { return 0 };
        let size = text.len() as u64;
        self.told().tell(file, change, text);
        size
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self, file: ControlFile) -> Arc<[u8]> {
        let state = self.state();
        let found = if file == ControlFile::Difference { &state.compared } else { &state.rehearsed };
        found.text.clone()
    }

    /// When what a file says may have changed last.
    pub(super) fn moved(&self, file: ControlFile) -> Moved {
        let (state, times) = (self.state(), self.image.times());
        match file {
            ControlFile::Backing | ControlFile::Chain => times.of_layers(),
            ControlFile::Cancel => Moved::default(),
            ControlFile::Difference => state.compared.moved,
            ControlFile::Rebase => state.rehearsed.moved,
            ControlFile::Partitions => times.of_disk(),
            // A rebase that failed may have left clusters of its own.
            ControlFile::Info | ControlFile::Map => {
                state.changes.moved().max(times.of_disk()).max(times.of_layers())
            }
            // It is under way, and something else at each moment.
            ControlFile::Status if state.running.is_some() => state.changes.moved().now(),
            ControlFile::Status => state.changes.moved().max(self.backing_files.moved()),
        }
    }

    /// Takes bytes written to a control file. `answer` is called when the command that they
    /// complete has ended; at once, if they complete none.
    pub(super) fn write(self: &Arc<Self>, opened: &mut Opened, bytes: &[u8], writer: Writer, answer: Answer) {
        match opened.file {
            ControlFile::Cancel => {
                self.cancel();
                answer(Ok(()));
            }
            ControlFile::Backing | ControlFile::Difference | ControlFile::Rebase => {
                match opened.line.push(bytes) {
                    Ok(None) => {
                        opened.writer = Some(writer);
                        answer(Ok(()));
                    }
                    Ok(Some(line)) => self.submit(opened.command(line), writer, answer),
                    Err(e) => self.submit(Err(e), writer, answer),
                }
            }
            ControlFile::Chain
            | ControlFile::Info
            | ControlFile::Map
            | ControlFile::Partitions
            | ControlFile::Status => answer(Err(ErrorKind::PermissionDenied.errno())),
        }
    }

    /// Takes the closing of a control file, which completes a command written without a newline if
    /// it is its writer who closes it. Whoever starts a program has a copy of his open files closed.
    pub(super) fn flush(self: &Arc<Self>, opened: &mut Opened, writer: Writer, answer: Answer) {
        let files = opened.writer.and_then(|writer| writer.files);
        if files.is_some() && files != writer.files {
            return answer(Ok(()));
        }
        match opened.line.finish() {
            None => answer(Ok(())),
            Some(line) => self.submit(opened.command(line), writer, answer),
        }
    }

    /// Stops the running job; whether there is one.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.state();
        let Some(running) = state.running.clone() else { return false };
        if !running.progress.is_cancelled() {
            running.progress.cancel();
            state.changes.add();
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
