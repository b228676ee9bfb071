//! A host file in memory that remembers what was done to it, and fails where it is told to.

use std::path::Path;
use std::sync::{Arc, Mutex};

use rebasefs::error::{Error, ErrorKind, Result};
use rebasefs::file::{Access, HostFile, HostOffset, Identity, Lock, Run, Stamp};

/// What was done to the file, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Write(u64, Vec<u8>),
    SetSize(u64),
    Sync,
}

impl Operation {
    /// Does the same to `bytes`.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, written) => {
                let (at, end) = (*at as usize, *at as usize + written.len());
                bytes.resize(bytes.len().max(end), 0);
                bytes[at..end].copy_from_slice(written);
            }
            Self::SetSize(size) => bytes.resize(*size as usize, 0),
            Self::Sync => {}
        }
    }
}

/// What was done to several files, in order, each with the number of the file.
pub type Journal = Arc<Mutex<Vec<(usize, Operation)>>>;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Operation>,
    /// Number of this file, and what is recorded beside its own log.
    journal: Option<(usize, Journal)>,
    /// The operation with this number fails, and all after it.
    fails_from: Option<(usize, ErrorKind)>,
    /// Whether of the first write that fails one half is stored.
    fails_halfway: bool,
    /// The write with this number is stored with a wrong byte.
    lies_at: Option<usize>,
    /// How many operations were tried, and which of them alone fails.
    tried: usize,
    fails_once: Option<(usize, ErrorKind)>,
    failed: Option<Operation>,
    /// Bytes that the file can have, as on a device that ends there.
    room: Option<u64>,
}

/// What is done, once, when these bytes are about to be written; nothing is locked meanwhile.
type Hook = Option<(Vec<u8>, Box<dyn FnOnce() + Send>)>;

/// The file. Its clones are the same file.
#[derive(Clone, Debug)]
pub struct MemoryFile(Arc<Mutex<State>>, Arc<Hooked>);

#[derive(Default)]
struct Hooked(Mutex<Hook>);

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl MemoryFile {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { bytes, ..State::default() })), Arc::default())
    }

    /// One of several files, with this number. What is done to it is recorded in `journal` too.
    pub fn recorded(bytes: Vec<u8>, number: usize, journal: &Journal) -> Self {
        let journal = Some((number, journal.clone()));
        Self(Arc::new(Mutex::new(State { bytes, journal, ..State::default() })), Arc::default())
    }

    /// Lets the operation with that number fail, and all after it.
    pub fn failing_from(bytes: Vec<u8>, number: usize, kind: ErrorKind) -> Self {
        Self(
            Arc::new(Mutex::new(State { bytes, fails_from: Some((number, kind)), ..State::default() })),
            Arc::default(),
        )
    }

    /// The same, but one half of the write that fails first is stored before it does.
    pub fn failing_halfway_from(bytes: Vec<u8>, number: usize, kind: ErrorKind) -> Self {
        let file = Self::failing_from(bytes, number, kind);
        file.0.lock().unwrap().fails_halfway = true;
        file
    }

    /// Lets the write with that number be stored with a wrong byte.
    pub fn lying_at(bytes: Vec<u8>, number: usize) -> Self {
        Self(Arc::new(Mutex::new(State { bytes, lies_at: Some(number), ..State::default() })), Arc::default())
    }

    /// Lets the operation with that number fail, and no other.
    pub fn failing_once(bytes: Vec<u8>, number: usize, kind: ErrorKind) -> Self {
        Self(
            Arc::new(Mutex::new(State { bytes, fails_once: Some((number, kind)), ..State::default() })),
            Arc::default(),
        )
    }

    /// A file that can have no more bytes than `room`.
    pub fn with_room(bytes: Vec<u8>, room: u64) -> Self {
        Self(Arc::new(Mutex::new(State { bytes, room: Some(room), ..State::default() })), Arc::default())
    }

    /// Lets `act` be done when `bytes` are about to be written.
    pub fn before_writing(&self, bytes: Vec<u8>, act: impl FnOnce() + Send + 'static) {
        *self.1.0.lock().unwrap() = Some((bytes, Box::new(act)));
    }

    /// The operation that failed once.
    pub fn failed(&self) -> Option<Operation> {
        self.0.lock().unwrap().failed.clone()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }

    pub fn log(&self) -> Vec<Operation> {
        self.0.lock().unwrap().log.clone()
    }

    fn perform(&self, operation: Operation) -> Result<()> {
        let is_awaited =
            |hook: &mut (Vec<u8>, _)| matches!(&operation, Operation::Write(_, bytes) if *bytes == hook.0);
        let hook = self.1.0.lock().unwrap().take_if(is_awaited);
        if let Some((_, act)) = hook {
            act();
        }
        let mut state = self.0.lock().unwrap();
        state.tried += 1;
        if let Some((number, kind)) = state.fails_once
            && state.tried == number + 1
        {
            state.failed = Some(operation);
            return Err(Error::new(kind, "the disk failed once").path(self.path()));
        }
        if let (Operation::Write(at, bytes), Some(room)) = (&operation, state.room)
            && at + bytes.len() as u64 > room
        {
            return Err(Error::new(ErrorKind::NoSpace, "the device ends here").path(self.path()));
        }
        if let Some((from, kind)) = state.fails_from
            && state.log.len() >= from
        {
            if let (true, Operation::Write(at, bytes)) = (state.fails_halfway, operation) {
                state.fails_halfway = false;
                let half = bytes[..bytes.len() / 2].to_vec();
                Operation::Write(at, half).apply(&mut state.bytes);
            }
            return Err(Error::new(kind, "the disk is broken").path(self.path()).offset(77));
        }
        let mut stored = operation.clone();
        if let (true, Operation::Write(_, bytes)) = (state.lies_at == Some(state.log.len()), &mut stored) {
            bytes[0] ^= 0xff;
        }
        stored.apply(&mut state.bytes);
        if let Some((number, journal)) = &state.journal {
            journal.lock().unwrap().push((*number, operation.clone()));
        }
        state.log.push(operation);
        Ok(())
    }
}

impl HostFile for MemoryFile {
    fn path(&self) -> &Path {
        Path::new("memory.qcow2")
    }

    fn identity(&self) -> Identity {
        let number = self.0.lock().unwrap().journal.as_ref().map_or(0, |(number, _)| *number);
        Identity { device: u64::MAX, inode: 1 + number as u64 }
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn size(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }

    fn stamp(&self) -> Result<Stamp> {
        Ok(Stamp { size: self.size(), inode: 1, ..Stamp::default() })
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, at: HostOffset, buffer: &mut [u8]) -> Result<()> {
        let state = self.0.lock().unwrap();
        let start = (at.0 as usize).min(state.bytes.len());
        let end = (start + buffer.len()).min(state.bytes.len());
        buffer[..end - start].copy_from_slice(&state.bytes[start..end]);
        buffer[end - start..].fill(0);
        Ok(())
    }

    fn write_at(&self, at: HostOffset, buffer: &[u8]) -> Result<()> {
        self.perform(Operation::Write(at.0, buffer.to_vec()))
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.perform(Operation::SetSize(size))
    }

    fn punch(&self, at: HostOffset, length: u64) -> Result<()> {
        self.perform(Operation::Write(at.0, vec![0; length as usize]))
    }

    fn allocate(&self, _: HostOffset, _: u64) -> Result<()> {
        unimplemented!("no rebase allocates space without writing to it")
    }

    fn sync(&self) -> Result<()> {
        self.perform(Operation::Sync)
    }

    fn run_at(&self, _: HostOffset, length: u64) -> Result<Run> {
        Ok(Run { is_data: true, length })
    }

    fn lock(&self, _: Lock) -> Result<()> {
        Ok(())
    }
}
