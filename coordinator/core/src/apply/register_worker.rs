//! An agent introduces itself. The same life takes up what it ran; another one ends the earlier one's attempts.

use std::collections::BTreeSet;

use helix_model::limits::{LABEL_BYTES_MAX, MAP_ENTRIES_MAX, WORKER_CAPACITY_MAX};
use helix_model::{LogTime, Reason, Room};

use crate::command::{RegisterWorker, WorkerOffer};
use crate::record::{Applied, DrainedBy, Standing, Trust, WorkerRecord};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;
use super::ending::{Stopping, lose_attempts};
use super::leave::{last_of, running};
use super::trust;

/// An address, isolation, limits or version is a short text.
const TEXT_BYTES_MAX: usize = 512;

pub(super) fn register_worker(state: &mut State, at: LogTime, c: &RegisterWorker, out: &mut Applied) -> Outcome {
    check_offer(&c.offer)?;
    let before = state.worker(&c.worker).cloned();
    let mut record = WorkerRecord {
        name: c.worker.clone(),
        instance: c.instance.clone(),
        offer: c.offer.clone(),
        standing: Standing::Present,
        drain: None,
        held: BTreeSet::new(),
        registered_at: at,
        trust: Trust::default(),
    };
    let Some(before) = before else {
        state.put_worker(record, out);
        return Ok(Reply::Done);
    };
    record.trust.clone_from(&before.trust);
    // An agent drained itself because it was about to go: now it is back.
    record.drain = before.drain.filter(|drain| drain.by == DrainedBy::Operator);
    if before.instance == c.instance {
        record.held.clone_from(&before.held);
        if before.offer == c.offer && before.standing == Standing::Present && before.drain == record.drain {
            return Ok(Reply::Unchanged);
        }
        state.put_worker(record, out);
        return Ok(Reply::Done);
    }
    // A boot ends every process; a new data directory ends none.
    let booted = before.instance.boot_id() != c.instance.boot_id();
    if !booted {
        record.held.clone_from(&before.held);
    }
    let keys = running(state, &c.worker);
    let message = "its worker came back as another instance";
    if let Some((build, assigned_at)) = last_of(state, &keys) {
        let lost = (Some(Reason::WorkerLost), Room::Host);
        let trust = trust::after(&record.trust, at, &build, assigned_at, lost, &state.policy);
        record.trust = trust.unwrap_or(record.trust);
    }
    let unproven = lose_attempts(state, at, &keys, Stopping::End, booted, message, out);
    record.held.extend(unproven);
    state.put_worker(record, out);
    Ok(Reply::Done)
}

fn check_offer(offer: &WorkerOffer) -> Result<(), Rejection> {
    if offer.capacity == 0 {
        return Err(Rejection::OfferInvalid("a capacity of 0"));
    }
    if offer.capacity > WORKER_CAPACITY_MAX {
        return Err(Rejection::OfferInvalid("a capacity above 250"));
    }
    if offer.labels.len() > MAP_ENTRIES_MAX || offer.platforms.len().max(offer.emulated.len()) > MAP_ENTRIES_MAX {
        return Err(Rejection::OfferInvalid("more labels or platforms than 256"));
    }
    if offer.labels.iter().any(|(key, value)| key.len() > LABEL_BYTES_MAX || value.len() > LABEL_BYTES_MAX) {
        return Err(Rejection::OfferInvalid("a label of more than 256 bytes"));
    }
    let secrets = offer.secrets.iter().flat_map(|secrets| secrets.keys());
    if secrets.clone().count() > MAP_ENTRIES_MAX || secrets.clone().any(|name| name.len() > LABEL_BYTES_MAX) {
        return Err(Rejection::OfferInvalid("more secrets than 256, or a name of more than 256 bytes"));
    }
    // What podman says of itself is longer.
    if offer.podman.len() > 2 * TEXT_BYTES_MAX {
        return Err(Rejection::OfferInvalid("a word on podman of more than 1,024 bytes"));
    }
    if [&offer.address, &offer.isolation, &offer.limits, &offer.version].iter().any(|text| text.len() > TEXT_BYTES_MAX)
    {
        return Err(Rejection::OfferInvalid("an address, isolation, limits or version of more than 512 bytes"));
    }
    Ok(())
}
