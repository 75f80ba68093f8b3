//! What a run tells whoever watches it; library code never prints.

/// Something worth showing.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A line that stays.
    Line(&'a str),
    /// Something that will probably be regretted; shown even where lines are not wanted.
    Warning(&'a str),
    /// How far the work at hand is.
    Progress {
        /// What is counted.
        what: &'a str,
        /// How many are done.
        done: usize,
        /// How many there are.
        total: usize,
    },
}

/// Who is told; called from several threads.
pub type Observer<'a> = &'a (dyn Fn(Event) + Sync);
