//! How far a rebase, or many of them, have come at one moment, in numbers that everybody shows alike:
//! the bar, the lines in a log, the objects for programs, `ctl/status`.

use std::time::Duration;

use serde_json::{Value, json};

use super::Phase;

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Standing {
    /// The step that is under way.
    pub phase: Phase,
    /// Guest bytes that have been looked at.
    pub done: u64,
    /// Of so many; `None` where that is not known of all images beforehand.
    pub total: Option<u64>,
    /// Guest bytes that are the overlay's own by now and were not.
    pub kept: u64,
    /// How much of the work is done, from 0 to 1.
    pub fraction: f64,
    /// Time since the plan was made.
    pub elapsed: Option<Duration>,
    /// Of many images: how many have come to their end, and of how many.
    pub images: Option<(usize, usize)>,
}

impl Standing {
    /// Bytes a second since the plan was made.
    pub fn rate(&self) -> Option<f64> {
        let seconds = self.elapsed?.as_secs_f64();
        (seconds > 0.0 && self.done > 0).then(|| self.done as f64 / seconds)
    }

    /// How long the rest takes if it goes on like this.
    pub fn left(&self) -> Option<Duration> {
        let seconds = self.elapsed?.as_secs_f64();
        let left = seconds * (1.0 - self.fraction) / self.fraction;
        (self.fraction > 0.0).then(|| Duration::try_from_secs_f64(left).ok()).flatten()
    }

    /// Per cent, rounded down to a hundredth: 100 is said when there is nothing left.
    pub fn percent(&self) -> f64 {
        (self.fraction * 10_000.0).floor() / 100.0
    }

    /// The numbers as an object; those that are not known are `null`.
    pub(crate) fn as_json(&self) -> Value {
        let mut object = json!({
            "phase": self.phase.word(),
            "percent": self.percent(),
            "bytes-done": self.done,
            "bytes-total": self.total,
            "bytes-kept": self.kept,
            "bytes-per-second": self.rate().map(|rate| rate as u64),
            "seconds-left": self.left().map(|left| left.as_secs_f64().ceil() as u64),
        });
        if let Some((done, all)) = self.images {
            object["images-done"] = done.into();
            object["images-total"] = all.into();
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_from_what_is_done() {
        let standing = Standing {
            done: 300,
            total: Some(400),
            fraction: 0.75,
            elapsed: Some(Duration::from_secs(3)),
            ..Standing::default()
        };
        assert_eq!(standing.rate(), Some(100.0));
        assert_eq!(standing.left(), Some(Duration::from_secs(1)));
        assert_eq!(standing.percent(), 75.0);
        let nothing = Standing::default();
        assert_eq!((nothing.rate(), nothing.left(), nothing.percent()), (None, None, 0.0));
        let almost = Standing { fraction: 0.999_999, ..standing };
        assert_eq!(almost.percent(), 99.99);
    }
}
