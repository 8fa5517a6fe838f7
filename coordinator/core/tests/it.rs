//! Tests of the registry's core: tables for every command and rejection, stories, properties.

#[path = "it/commands.rs"]
mod commands;
#[path = "it/deadlines.rs"]
mod deadlines;
#[path = "it/images.rs"]
#[allow(clippy::unwrap_used)]
mod images;
#[path = "it/properties.rs"]
mod properties;
#[path = "it/rejections.rs"]
mod rejections;
#[path = "it/resources.rs"]
#[allow(clippy::unwrap_used)]
mod resources;
#[path = "it/retention.rs"]
#[allow(clippy::unwrap_used)]
mod retention;
#[path = "it/retries.rs"]
#[allow(clippy::unwrap_used)]
mod retries;
#[path = "it/scheduling.rs"]
mod scheduling;
#[path = "it/stale.rs"]
#[allow(clippy::unwrap_used)]
mod stale;
#[path = "it/story.rs"]
mod story;
#[path = "it/trust.rs"]
#[allow(clippy::unwrap_used)]
mod trust;
