//! Several platforms are one build.
