//! A network between hosts that can be broken: an Ethernet switch in this process, between TAP devices.
//!
//! Each direction of each pair of hosts has rules of its own: cut, loss, delay with jitter, duplication. Frames that are
//! delayed by different times overtake each other. What a rule drops is counted, so that a fault that touched nothing is
//! noticed.

#![allow(unsafe_code)] // One ioctl per device, which no library at hand wraps.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Frames are large, so that blobs cost few of them.
pub(super) const MTU: usize = 16_000;

/// How a direction treats frames.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub(super) struct Rule {
    /// Nothing passes.
    pub(super) cut: bool,
    /// The share that is lost.
    pub(super) loss: f64,
    /// The share that arrives twice.
    pub(super) twice: f64,
    /// How long a frame takes.
    pub(super) delay: Duration,
    /// By how much that differs, at most.
    pub(super) jitter: Duration,
}

/// A frame on its way: when it arrives, its number, where it goes.
type Late = (Instant, u64, u8, Vec<u8>);

struct Shared {
    rules: Mutex<BTreeMap<(u8, u8), Rule>>,
    late: Mutex<BinaryHeap<Reverse<Late>>>,
    wake: Condvar,
    ports: BTreeMap<u8, File>,
    stop: AtomicBool,
    number: AtomicU64,
    hit: AtomicU64,
}

/// The switch; frames pass until it is dropped.
pub(super) struct Switch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The hardware address of a host's port.
#[must_use]
pub(super) fn address(host: u8) -> String {
    format!("02:00:00:00:00:{host:02x}")
}

/// Makes a TAP device named `eth0` in the network namespace of the thread that calls.
///
/// # Errors
/// When there are no TAP devices here, or this process may not make them.
pub(super) fn tap() -> io::Result<File> {
    const NAME: &[u8] = b"eth0";
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: the descriptor is open and the structure is the one that this request takes.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

impl Switch {
    /// Joins the devices of hosts. What is random follows from the seed and the order of frames.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(ports: BTreeMap<u8, File>, seed: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            rules: Mutex::default(),
            late: Mutex::default(),
            wake: Condvar::new(),
            ports,
            stop: AtomicBool::new(false),
            number: AtomicU64::new(0),
            hit: AtomicU64::new(0),
        });
        let mut threads = Vec::new();
        for (host, port) in &shared.ports {
            let (shared, host, mut port) = (Arc::clone(&shared), *host, port.try_clone()?);
            let mut random = StdRng::seed_from_u64(seed ^ u64::from(host));
            threads.push(std::thread::Builder::new().name(format!("port {host}")).spawn(move || {
                let mut frame = vec![0; MTU + 64];
                while let Ok(length) = port.read(&mut frame) {
                    if shared.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    shared.pass(host, &frame[..length], &mut random);
                }
            })?);
        }
        let late = Arc::clone(&shared);
        threads.push(std::thread::Builder::new().name("late frames".to_owned()).spawn(move || late.deliver_late())?);
        Ok(Self { shared, threads })
    }

    /// Sets the rule of a direction.
    pub(super) fn set(&self, from: u8, to: u8, rule: Rule) {
        self.shared.rules().insert((from, to), rule);
    }

    /// Heals everything. Says how many frames rules have touched since the last time.
    pub(super) fn heal(&self) -> u64 {
        self.shared.rules().clear();
        self.shared.hit.swap(0, Ordering::Relaxed)
    }
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, BTreeMap<(u8, u8), Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self, from: u8, frame: &[u8], random: &mut StdRng) {
        let Some(to) = frame.get(5).copied() else { return };
        let Some(port) = self.ports.get(&to) else { return };
        let rule = self.rules().get(&(from, to)).copied().unwrap_or_default();
        if rule == Rule::default() {
            // A full queue loses frames, as a real switch does.
            let _ = (&mut &*port).write(frame);
            return;
        }
        self.hit.fetch_add(1, Ordering::Relaxed);
        if rule.cut || random.random_bool(rule.loss) {
            return;
        }
        let copies = if random.random_bool(rule.twice) { 2 } else { 1 };
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..copies {
            let wait = rule.delay + rule.jitter.mul_f64(random.random());
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            late.push(Reverse((Instant::now() + wait, number, to, frame.to_vec())));
        }
        self.wake.notify_one();
    }

    fn deliver_late(&self) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let wait = match late.peek() {
                Some(Reverse((when, ..))) if *when <= now => {
                    if let Some(Reverse((_, _, to, frame))) = late.pop()
                        && let Some(port) = self.ports.get(&to)
                    {
                        let _ = (&mut &*port).write(&frame);
                    }
                    continue;
                }
                Some(Reverse((when, ..))) => *when - now,
                None => Duration::from_secs(1),
            };
            late = self.wake.wait_timeout(late, wait).map_or_else(|error| error.into_inner().0, |(late, _)| late);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake.notify_all();
        // Readers wait for frames, and end with the process: a device has no end of file.
        if let Some(late) = self.threads.pop() {
            let _ = late.join();
        }
    }
}
