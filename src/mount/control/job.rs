//! One rebase on a worker thread: start it or say why not, watch its writer, record what came of
//! it, answer.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::{Answer, Bytes, Command, Control, Done, Outcome, Running, State, Task, Writer, report};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::file::CacheMode;
use crate::rebase::{Progress, Rehearsal, Report, look, rebase, reclaim, rehearse, watched};

impl Control {
    /// Starts the job that was asked for, or answers why not.
    pub(super) fn submit(self: &Arc<Self>, command: Result<Command>, writer: Writer, answer: Answer) {
        let mut state = self.state();
        if let Err(error) = admit(&state) {
            let errno = error.errno();
            state.refused = Some(error.to_string());
            state.changes.add();
            drop(state);
            return answer(Err(errno));
        }
        state.refused = None;
        let refused = match command.and_then(|command| self.refuse_read_only(&command).map(|()| command)) {
            Ok(command) => return self.start_job(&mut state, command, writer, answer),
            Err(error) => error,
        };
        let errno = refused.errno();
        state.last = Some(Outcome { asked: None, result: Err(refused) });
        state.changes.add();
        drop(state);
        answer(Err(errno));
    }

    fn refuse_read_only(&self, command: &Command) -> Result<()> {
        match &self.read_only {
            None => Ok(()),
            Some(_) if command.task != Task::Rebase => Ok(()),
            Some(why) => {
                let error =
                    Error::new(why.kind(), format!("the image could be opened for reading only: {why}"));
                Err(error.hint("make it writable, and mount it again"))
            }
        }
    }

    fn start_job(self: &Arc<Self>, state: &mut State, command: Command, writer: Writer, answer: Answer) {
        let running = Arc::new(Running { command, progress: Progress::default() });
        let (control, job) = (self.clone(), running.clone());
        let work = move || {
            let result = control.watch(&job, writer);
            answer(control.record(job, result));
        };
        match thread::Builder::new().name("rebase".into()).spawn(work) {
            Ok(worker) => {
                state.running = Some(running);
                state.worker = Some(worker);
                state.changes.add();
            }
            Err(e) => {
                // The answer has gone with the closure; fuser gives EIO in its place.
                let result = Err(Error::io(e, "cannot start a thread"));
                state.last = Some(Outcome { asked: Some(running), result });
                state.changes.add();
            }
        }
    }

    /// Runs a rebase, and stops it when its writer wants to stop.
    fn watch(&self, job: &Running, writer: Writer) -> Result<Done> {
        watched(
            || self.run(job),
            || {
                if writer.wants_to_stop() {
                    job.progress.cancel();
                }
            },
        )
    }

    fn run(&self, job: &Running) -> Result<Done> {
        let not_yet = || Error::new(ErrorKind::Busy, "the mount is not ready yet");
        let mounted = self.mounted.get().ok_or_else(not_yet)?;
        let Running { command: Command { task, options, request }, progress } = job;
        let _changing = self.image.changing();
        self.look_at_backing_files();
        // A new one for each job: it would keep the files of old chains open.
        let opener = mounted.opener.renewed().caching(CacheMode::default(), options.backing_cache);
        match task {
            Task::Rebase => {}
            Task::Rehearse => {
                let found = rehearse(&self.image.chain(), &opener, request, progress)?;
                return Ok(Done::Rebased(self.show(&found)));
            }
            Task::Compare => {
                let found = look(&self.image.chain(), &opener, request, progress)?;
                let text = report::difference(&self.image.chain(), request, &found);
                self.state().compared.set(text);
                return Ok(Done::Compared(found.bytes()));
            }
        }
        let (chain, mut report) = rebase(&self.image.chain(), &opener, request, progress)?;
        self.image.replace(chain.clone());
        // Beside those who write, what was read from the image until now may be what it was long ago.
        let may_be_others = job.command.changes_bytes() || !opener.takes_locks();
        match may_be_others {
            true => self.image.times().note_exchanged(),
            false => self.image.times().note_rebased(),
        }
        (mounted.replaced)(if may_be_others { Bytes::Others } else { Bytes::Same });
        if options.reclaim {
            let is_stopped = || progress.is_cancelled();
            let publish = |chain| self.image.supersede(chain, is_stopped);
            let reclaimed = self
                .image
                .wait_for_readers_of_the_past(is_stopped)
                .and_then(|()| reclaim(&chain, &opener, progress, publish));
            (mounted.replaced)(Bytes::Same);
            report.reclaimed = reclaimed.doing(|| "reclaiming space after the rebase".to_owned())?;
        }
        Ok(Done::Rebased(report))
    }

    /// Lets `ctl/rebase` read as what a dry run found.
    fn show(&self, found: &Rehearsal) -> Report {
        let chain = self.image.chain();
        let image = chain.top().map_or(Path::new(""), |top| top.file().path());
        let text = format!("{:#}\n", found.as_json(image));
        self.state().rehearsed.set(text.into_bytes());
        found.report
    }

    /// Notes what came of a job, for `ctl/status` and for the writer.
    fn record(&self, job: Arc<Running>, result: Result<Done>) -> Result<(), i32> {
        let errno = result.as_ref().map(drop).map_err(Error::errno);
        match &result {
            Ok(_) => log::info!("{}: done", job.command.in_words()),
            Err(e) if e.kind() == ErrorKind::Cancelled => log::info!("{}: {e}", job.command.in_words()),
            Err(e) => log::warn!("{}: {e}", job.command.in_words()),
        }
        let mut state = self.state();
        state.running = None;
        state.last = Some(Outcome { asked: Some(job), result });
        state.changes.add();
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
            let what = format!("busy: {} is under way", running.command.in_words());
            Err(Error::new(ErrorKind::Busy, what).hint("`echo > ctl/cancel` stops it"))
        }
    }
}
