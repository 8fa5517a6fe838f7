//! How sure it is that no process of an attempt is left.

/// What is known of an ended attempt's processes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Death {
    /// None is left: its runner saw the last one end, or the kernel said so.
    #[default]
    Proven,
    /// None was found after its runner had died, and one that hid would not have been.
    Unproven,
}
