//! One rebase on a worker thread: start it or say why not, watch its writer, record what came of
//! it, answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::{Answer, Control, Outcome, Running, State, Writer, report};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::rebase::{Progress, Report, Request, rebase};

/// How often to look whether the writer wants to stop.
const WATCH: Duration = Duration::from_millis(100);

impl Control {
    /// Starts the job that was asked for, or answers why not.
    pub(super) fn submit(self: &Arc<Self>, request: Result<Request>, writer: Writer, answer: Answer) {
        let mut state = self.state();
        if let Err(error) = admit(&state) {
            let errno = error.errno();
            state.refused = Some(error.to_string());
            drop(state);
            return answer(Err(errno));
        }
        state.refused = None;
        let refused = match request.and_then(|request| self.refuse_read_only().map(|()| request)) {
            Ok(request) => return self.start_job(&mut state, request, writer, answer),
            Err(error) => error,
        };
        let errno = refused.errno();
        state.last = Some(Outcome { request: None, result: Err(refused) });
        drop(state);
        answer(Err(errno));
    }

    fn refuse_read_only(&self) -> Result<()> {
        match &self.read_only {
            None => Ok(()),
            Some(why) => {
                Err(Error::new(why.kind(), format!("the image could be opened for reading only: {why}")))
            }
        }
    }

    fn start_job(self: &Arc<Self>, state: &mut State, request: Request, writer: Writer, answer: Answer) {
        let running = Arc::new(Running { request, progress: Progress::default() });
        let (control, job) = (self.clone(), running.clone());
        let work = move || {
            let result = control.watch(&job, writer);
            answer(control.record(&job.request, result));
        };
        match thread::Builder::new().name("rebase".into()).spawn(work) {
            Ok(worker) => {
                state.running = Some(running);
                state.worker = Some(worker);
                self.jobs.fetch_add(1, Ordering::AcqRel);
            }
            Err(e) => {
                // The answer has gone with the closure; fuser gives EIO in its place.
                let result = Err(Error::io(e, "cannot start a thread"));
                state.last = Some(Outcome { request: Some(running.request.clone()), result });
            }
        }
    }

    /// Runs a rebase, and stops it when its writer wants to stop.
    fn watch(&self, job: &Running, writer: Writer) -> Result<(Chain, Report)> {
        thread::scope(|scope| {
            let (sender, receiver) = channel();
            scope.spawn(move || sender.send(self.run(job)));
            loop {
                match receiver.recv_timeout(WATCH) {
                    Ok(result) => return result,
                    Err(RecvTimeoutError::Timeout) if writer.wants_to_stop() => job.progress.cancel(),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(Error::new(ErrorKind::Io, "the rebase broke off (this is a bug)"));
                    }
                }
            }
        })
    }

    fn run(&self, job: &Running) -> Result<(Chain, Report)> {
        let not_yet = || Error::new(ErrorKind::Busy, "the mount is not ready yet");
        let mounted = self.mounted.get().ok_or_else(not_yet)?;
        // A new one for each job: it would keep the files of old chains open.
        let opener = mounted.opener.renewed();
        rebase(&self.image.chain(), &opener, &job.request, &job.progress)
    }

    /// Shows what came of a job: to readers, in `ctl/status`, and to the writer.
    fn record(&self, request: &Request, result: Result<(Chain, Report)>) -> Result<(), i32> {
        let result = result.map(|(chain, report)| {
            self.image.replace(chain);
            self.mounted.get().inspect(|mounted| (mounted.replaced)());
            report
        });
        let errno = result.as_ref().map(drop).map_err(Error::errno);
        match &result {
            Ok(_) => log::info!("{}: done", report::asked_for(request)),
            Err(e) => log::info!("{}: {e}", report::asked_for(request)),
        }
        let mut state = self.state();
        state.running = None;
        state.last = Some(Outcome { request: Some(request.clone()), result });
        errno
    }
}

/// Whether another job may start now.
fn admit(state: &State) -> Result<()> {
    if state.is_closed {
        return Err(Error::new(ErrorKind::Busy, "the mount is being taken down"));
    }
    match &state.running {
        None => Ok(()),
        Some(running) => {
            let what = format!("busy: {} is under way", report::asked_for(&running.request));
            Err(Error::new(ErrorKind::Busy, what).hint("write anything to ctl/cancel to stop it"))
        }
    }
}
