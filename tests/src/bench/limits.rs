//! What the machine itself allows, measured here and now: nothing durable, remote or started can be faster than these.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::figure::{median, ms, per_second};

/// How long rates are measured.
const WINDOW: Duration = Duration::from_secs(1);

/// The median time in milliseconds of an fdatasync of 256 bytes in a directory.
///
/// # Errors
/// What the file system says.
pub fn sync_ms(directory: &Path) -> anyhow::Result<f64> {
    let path = directory.join(format!("helix-bench-sync-{}", std::process::id()));
    let file = fs::File::create(&path)?;
    let mut times = Vec::new();
    for round in 0..200u64 {
        file.write_all_at(&[0; 256], round * 256)?;
        let started = Instant::now();
        file.sync_data()?;
        times.push(ms(started.elapsed()));
    }
    fs::remove_file(path)?;
    Ok(median(times).unwrap_or_default())
}

/// Million bytes a second that can be written one after the other and synced.
///
/// # Errors
/// What the file system says.
pub fn disk_megabytes_per_second(directory: &Path) -> anyhow::Result<f64> {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: usize = 256;
    let path = directory.join(format!("helix-bench-disk-{}", std::process::id()));
    let mut file = fs::File::create(&path)?;
    let (block, started) = (vec![0x5a; BLOCK], Instant::now());
    for _ in 0..BLOCKS {
        file.write_all(&block)?;
    }
    file.sync_data()?;
    let took = started.elapsed();
    fs::remove_file(path)?;
    Ok((BLOCK * BLOCKS) as f64 / took.as_secs_f64() / 1e6)
}

/// The median time in milliseconds of a byte there and a byte back over loopback.
///
/// # Errors
/// What the network says.
pub fn round_trip_ms() -> anyhow::Result<f64> {
    let (mut times, left) = (Vec::new(), std::cell::Cell::new(2000));
    ping(|| left.get() == 0, &mut |time| {
        times.push(ms(time));
        left.set(left.get() - 1);
    })?;
    Ok(median(times).unwrap_or_default())
}

/// Exchanges of a byte over loopback a second, one connection for each core at the same time.
///
/// # Errors
/// What the network says.
pub fn round_trips_per_second() -> anyhow::Result<f64> {
    on_all_cores(|count| {
        let started = Instant::now();
        ping(|| started.elapsed() > WINDOW, &mut |_| count())
    })
}

/// Starts of `/bin/true`, waited for, a second, on all cores at the same time.
///
/// # Errors
/// When it does not start.
pub fn starts_per_second() -> anyhow::Result<f64> {
    on_all_cores(|count| {
        let started = Instant::now();
        while started.elapsed() < WINDOW {
            start()?;
            count();
        }
        Ok(())
    })
}

/// The median time in milliseconds from the start of `/bin/true` to its end.
///
/// # Errors
/// When it does not start.
pub fn start_ms() -> anyhow::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..100 {
        let started = Instant::now();
        start()?;
        times.push(ms(started.elapsed()));
    }
    Ok(median(times).unwrap_or_default())
}

fn start() -> anyhow::Result<()> {
    let status = Command::new("/bin/true").stdin(Stdio::null()).status()?;
    ensure!(status.success(), "/bin/true: {status}");
    Ok(())
}

fn on_all_cores(work: impl Fn(&dyn Fn()) -> anyhow::Result<()> + Sync) -> anyhow::Result<f64> {
    let count = AtomicU64::new(0);
    let add = || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(|| work(&add))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    Ok(per_second(count.load(Ordering::Relaxed), started.elapsed()))
}

/// Sends a byte to a thread that sends it back, until told to end.
fn ping(done: impl Fn() -> bool, each: &mut dyn FnMut(Duration)) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut stream = TcpStream::connect(listener.local_addr()?)?;
    stream.set_nodelay(true)?;
    let (mut other, _) = listener.accept()?;
    other.set_nodelay(true)?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while other.read_exact(&mut byte).is_ok() && other.write_all(&byte).is_ok() {}
    });
    let mut byte = [0];
    while !done() {
        let started = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        each(started.elapsed());
    }
    drop(stream);
    echo.join().expect("it does not panic");
    Ok(())
}
