//! One bar on the terminal. What is printed meanwhile goes above it.

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

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
    let shown = lock(&SHOWN).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// Takes the bar off the terminal for good: the program is about to end.
pub(in crate::cli) fn take_away() {
    if let Some(bar) = lock(&SHOWN).take() {
        bar.finish_and_clear();
    }
}

/// A bar on the standard error.
pub(super) struct Bar {
    bar: ProgressBar,
    /// The word before the bar, and the numbers behind it: drawn together with it.
    words: Arc<Mutex<(&'static str, String)>>,
    /// The columns that its style was made for.
    columns: Option<u16>,
}

impl Bar {
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr());
        *lock(&SHOWN) = Some(bar.clone());
        Self { bar, words: Arc::default(), columns: None }
    }

    /// Terminals are made wider and narrower while a bar is on them.
    fn fit(&mut self) {
        let columns = print::columns_of_stderr();
        if self.columns == Some(columns) {
            return;
        }
        // At its end the cursor goes back: the `^C` of a terminal stands in the bar then, which is cleared
        // with it, and not in a line of its own, which would be cleared in its place.
        let template = match columns {
            NARROW.. => "{phase:7} {wide_bar} {percent:>3} %  {numbers}\r",
            _ => "{phase:7} {wide_bar} {percent:>3} %\r",
        };
        // A template that is wrong leaves the bar as it was.
        if let Ok(style) = ProgressStyle::with_template(template) {
            let (phase, numbers) = (self.words.clone(), self.words.clone());
            let write = |text: &str, out: &mut dyn Write| {
                // There is no other place to say it.
                let _ = out.write_str(text);
            };
            let style = style
                .with_key("phase", move |_: &ProgressState, out: &mut dyn Write| write(lock(&phase).0, out))
                .with_key("numbers", move |_: &ProgressState, out: &mut dyn Write| {
                    write(&lock(&numbers).1, out);
                });
            self.bar.set_style(style.progress_chars(if print::is_unicode() { "━━─" } else { "##-" }));
        }
        self.columns = Some(columns);
    }
}

impl Show for Bar {
    fn now(&mut self, standing: &Standing) {
        self.fit();
        let numbers = numbers(standing, self.columns.unwrap_or(WIDE));
        *lock(&self.words) = (standing.phase.word(), numbers);
        self.bar.update(|state| state.set_pos((standing.fraction * PARTS as f64) as u64));
    }

    /// The line that tells what was done comes in its place.
    fn end(&mut self, _: &Standing, _: bool) {
        // Whoever prints at this moment must not find the bar still drawn and unknown to him.
        self.bar.finish_and_clear();
        lock(&SHOWN).take();
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
