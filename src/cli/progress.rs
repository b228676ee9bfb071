//! Showing how far something has come: a bar for people at a terminal, a line now and then where
//! nobody watches, QEMU's percentage, objects for programs. All say the numbers of [`Standing`].

mod bar;

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::{print, size};
use crate::error::Result;
use crate::rebase::Standing;
pub(super) use bar::{aside, take_away};

use bar::Bar;

/// How often the numbers are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// When the first line comes; each further one takes twice as long as the one before …
const FIRST_LINE: Duration = Duration::from_secs(5);
/// … but not longer than this.
const RARELY: Duration = Duration::from_secs(60);

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// A bar on a terminal, lines elsewhere
    Auto,
    /// A bar with rate and time left, on the standard error
    Bar,
    /// A line now and then, on the standard error
    Lines,
    /// QEMU's form, on the standard output: (12.34/100%)
    Qemu,
    /// For programs: an object a line, on the standard error
    Json,
    /// Nothing
    None,
}

/// Whether and how to show how far it has come.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Showing {
    /// Show how far it has come in QEMU's form: (12.34/100%)
    #[arg(short = 'p', conflicts_with = "progress")]
    qemu: bool,
    /// Show how far it has come: without FORM as -p does
    #[arg(
        long,
        value_enum,
        value_name = "FORM",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "qemu",
        default_value = "auto"
    )]
    progress: Form,
}

impl Showing {
    fn form(self) -> Form {
        match self.progress {
            _ if self.qemu => Form::Qemu,
            Form::Auto if std::io::stderr().is_terminal() => Form::Bar,
            Form::Auto => Form::Lines,
            form => form,
        }
    }

    /// Does the work and shows meanwhile how far it has come.
    pub(super) fn during<T>(
        self,
        standing: impl Fn() -> Standing + Sync,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut show: Box<dyn Show + Send> = match self.form() {
            Form::None => return work(),
            Form::Bar => Box::new(Bar::new()),
            Form::Qemu => Box::new(Qemu),
            Form::Json => Box::new(Json { last: None }),
            Form::Lines | Form::Auto => Box::new(Lines::since(Instant::now())),
        };
        let (stop, stopped) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let standing = &standing;
            let shower = scope.spawn(move || {
                while stopped.recv_timeout(LOOK).is_err_and(|e| e == RecvTimeoutError::Timeout) {
                    show.now(&standing());
                }
                show
            });
            let result = work();
            drop(stop);
            if let Ok(mut show) = shower.join() {
                show.end(&standing(), result.is_ok());
            }
            result
        })
    }
}

/// One form. What cannot be shown stops nothing.
trait Show {
    /// It has come so far.
    fn now(&mut self, standing: &Standing);

    /// It is over, and done or not.
    fn end(&mut self, standing: &Standing, is_done: bool);
}

/// As `qemu-img -p` has it.
struct Qemu;

impl Show for Qemu {
    fn now(&mut self, standing: &Standing) {
        let _ = print::print(&format!("    ({:.2}/100%)\r", standing.percent()));
    }

    fn end(&mut self, _: &Standing, is_done: bool) {
        if is_done {
            let _ = print::print("    (100.00/100%)\r\n");
        }
    }
}

/// An object a line, whenever something has changed.
struct Json {
    last: Option<(u64, f64, &'static str)>,
}

impl Show for Json {
    fn now(&mut self, standing: &Standing) {
        let state = (standing.done, standing.fraction, standing.phase.word());
        if self.last != Some(state) {
            self.last = Some(state);
            print::complain(&standing.as_json().to_string());
        }
    }

    fn end(&mut self, standing: &Standing, is_done: bool) {
        self.now(&if is_done { over(standing) } else { *standing });
    }
}

/// The same when all is done. What needed no look is done as well.
fn over(standing: &Standing) -> Standing {
    Standing { phase: crate::rebase::Phase::Done, fraction: 1.0, ..*standing }
}

/// A line now and then, for logs.
struct Lines {
    next: Instant,
    pause: Duration,
}

impl Lines {
    fn since(start: Instant) -> Self {
        Self { next: start + FIRST_LINE, pause: FIRST_LINE }
    }

    /// Whether it is time for a line, after which the next one waits twice as long.
    fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.pause = (self.pause * 2).min(RARELY);
        self.next += self.pause;
        true
    }
}

impl Show for Lines {
    fn now(&mut self, standing: &Standing) {
        if self.is_due(Instant::now()) {
            print::complain(&format!("rebasefs: {}", line(standing)));
        }
    }

    fn end(&mut self, _: &Standing, _: bool) {}
}

/// All numbers in words: `copy: 12 %, 1.5 GiB of 12 GiB, 300 MiB/s, 35 s left`.
fn line(standing: &Standing) -> String {
    let mut parts = vec![format!("{}: {:.0} %", standing.phase.word(), standing.percent().floor())];
    parts.push(amount(standing));
    parts.extend(standing.images.map(|(done, all)| format!("{done} of {all} images")));
    parts.extend(standing.rate().map(rate));
    parts.extend(standing.left().map(|left| format!("{} left", time(left))));
    parts.join(", ")
}

fn amount(standing: &Standing) -> String {
    match standing.total {
        Some(total) => format!("{} of {}", size::text(standing.done), size::text(total)),
        None => size::text(standing.done),
    }
}

fn rate(rate: f64) -> String {
    format!("{}/s", size::text(rate as u64))
}

/// A time as people say it: `0.35 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(super) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds.round() as u64 {
        _ if seconds < 0.995 => format!("{seconds:.2} s"),
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        whole if whole < 60 => format!("{whole} s"),
        whole if whole < 3600 => format!("{} min {} s", whole / 60, whole % 60),
        whole => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_people_tell_them() {
        let cases = [
            (0, "0.00 s"),
            (350, "0.35 s"),
            (994, "0.99 s"),
            (995, "1.0 s"),
            (9_949, "9.9 s"),
            (9_950, "10 s"),
            (59_499, "59 s"),
            (59_500, "1 min 0 s"),
            (200_000, "3 min 20 s"),
            (3_599_600, "1 h 0 min"),
            (90_000_000, "25 h 0 min"),
        ];
        for (milliseconds, words) in cases {
            assert_eq!(time(Duration::from_millis(milliseconds)), words);
        }
    }

    #[test]
    fn lines_come_more_and_more_rarely_and_none_where_it_is_over_soon() {
        let start = Instant::now();
        let mut lines = Lines::since(start);
        let due: Vec<u64> = (0..300).filter(|&s| lines.is_due(start + Duration::from_secs(s))).collect();
        assert_eq!(due, [5, 15, 35, 75, 135, 195, 255]);
    }

    #[test]
    fn a_line_says_what_is_known_and_nothing_else() {
        assert_eq!(line(&Standing { total: Some(0), ..Standing::default() }), "plan: 0 %, 0 B of 0 B");
        let standing = Standing {
            phase: crate::rebase::Phase::Copy,
            done: 3 << 20,
            total: Some(4 << 20),
            fraction: 0.75,
            elapsed: Some(Duration::from_secs(30)),
            ..Standing::default()
        };
        assert_eq!(line(&standing), "copy: 75 %, 3 MiB of 4 MiB, 102 KiB/s, 10 s left");
        let many = Standing { total: None, images: Some((3, 100)), elapsed: None, ..standing };
        assert_eq!(line(&many), "copy: 75 %, 3 MiB, 3 of 100 images");
    }
}
