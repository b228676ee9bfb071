//! One bar on the terminal. What is printed meanwhile goes above it.

use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Show, amount, rate, time};
use crate::cli::print;
use crate::rebase::{Phase, Standing};

/// What the bar is divided into.
const PARTS: u64 = 10_000;
/// Terminals with so many columns have room for all numbers, and with so many for the most needed ones.
const WIDE: u16 = 90;
const NARROW: u16 = 58;

/// The bar that is on the terminal now.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Prints something while no bar is there.
pub(in crate::cli) fn aside<T>(print: impl FnOnce() -> T) -> T {
    let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// A bar on the standard error.
pub(super) struct Bar {
    bar: ProgressBar,
    /// The columns that its style was made for.
    columns: Option<u16>,
}

impl Bar {
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr());
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
        Self { bar, columns: None }
    }

    /// Terminals are made wider and narrower while a bar is on them.
    fn fit(&mut self) {
        let columns = print::columns_of_stderr();
        if self.columns == Some(columns) {
            return;
        }
        let template = match columns {
            WIDE.. => "{prefix:7} {wide_bar} {percent:>3} %  {msg}",
            NARROW.. => "{prefix:7} {wide_bar} {percent:>3} %  {msg}",
            _ => "{prefix:7} {wide_bar} {percent:>3} %",
        };
        // A template that is wrong leaves the bar as it was.
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("━━─"));
        }
        self.columns = Some(columns);
    }
}

impl Show for Bar {
    fn now(&mut self, standing: &Standing) {
        self.fit();
        self.bar.set_prefix(standing.phase.word());
        self.bar.set_message(numbers(standing, self.columns.unwrap_or(WIDE)));
        self.bar.set_position((standing.fraction * PARTS as f64) as u64);
    }

    /// The line that tells what was done comes in its place.
    fn end(&mut self, _: &Standing, _: bool) {
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.bar.finish_and_clear();
    }
}

/// The numbers beside the bar, as many as there is room for.
fn numbers(standing: &Standing, columns: u16) -> String {
    if standing.phase == Phase::Plan {
        return "looking at metadata".to_owned();
    }
    let amount = match standing.images {
        Some((done, all)) => format!("{done} of {all} images"),
        None => amount(standing),
    };
    let left = standing.left().map(|left| format!("{} left", time(left)));
    let rate = standing.rate().map(rate);
    let parts = match columns {
        WIDE.. => [Some(amount), rate, left],
        _ => [Some(amount), None, left],
    };
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}
