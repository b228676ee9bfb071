//! What a rebase did, or would do, as JSON: the same on the command line and in `ctl/rebase`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Copied, Rehearsal, Report};

impl Report {
    /// The figures, in bytes of guest address space, with the name of the image.
    pub(crate) fn as_json(&self, image: &Path) -> Value {
        let Self { missing, equal, compared, copied, zeroed, reclaimed } = *self;
        json!({
            "filename": image.to_string_lossy(),
            "dry-run": false,
            "missing": missing,
            "equal": equal,
            "compared": compared,
            "copied": copied,
            "zeroed": zeroed,
            "reclaimed": reclaimed,
        })
    }
}

impl Rehearsal {
    /// The figures and the ranges.
    pub(crate) fn as_json(&self, image: &Path) -> Value {
        let range =
            |range: &Copied| json!({"start": range.start.0, "length": range.length, "zero": range.is_zero});
        let mut object = self.report.as_json(image);
        object["dry-run"] = true.into();
        object["ranges"] = self.ranges.iter().map(range).collect();
        if self.is_cut {
            object["ranges-cut"] = true.into();
        }
        object
    }
}
