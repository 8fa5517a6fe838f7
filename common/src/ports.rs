//! Ports for a server whose number must be known before it listens, and must still be free when it listens again.
//!
//! A port that the kernel gives out for 0 is one of its ephemeral ones: until the server has it, and each time the server
//! restarts, any connection that somebody opens may be given the same. So these ports lie below the ephemeral range.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, PoisonError};

/// Below it are the well-known ports, and many that people configure.
const FIRST: u16 = 10_000;

/// Where the ephemeral ports begin if the kernel does not say.
const EPHEMERAL_DEFAULT: u16 = 32_768;

/// Where the next search of this process begins: no port is given out twice before all were.
static NEXT: Mutex<Option<u16>> = Mutex::new(None);

/// The first of `count` consecutive ports that nobody listens on at 127.0.0.1, and that this process was not given before.
/// Searches begin anywhere, so that two processes that ask at the same time hardly get the same.
///
/// # Errors
/// When there are no such ports.
pub fn free(count: u16) -> io::Result<u16> {
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    search(count, ephemeral_begin(), &mut next)
}

fn search(count: u16, end: u16, next: &mut Option<u16>) -> io::Result<u16> {
    let none = || io::Error::new(io::ErrorKind::AddrInUse, format!("no {count} free ports in a row in {FIRST}..{end}"));
    let span = end.checked_sub(FIRST).filter(|span| *span >= count).ok_or_else(none)?;
    let mut begin = next.unwrap_or_else(|| FIRST + rand::random_range(0..span));
    for _ in 0..span {
        if begin.checked_add(count).is_none_or(|last| last > end) {
            begin = FIRST;
        }
        match (begin..begin + count).find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_err()) {
            Some(taken) => begin = taken.saturating_add(1),
            None => {
                *next = Some(begin + count);
                return Ok(begin);
            }
        }
    }
    Err(none())
}

fn ephemeral_begin() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(EPHEMERAL_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_once_lie_in_a_row_and_are_not_ephemeral() {
        let mut seen = std::collections::BTreeSet::new();
        for count in [1, 3, 9, 1] {
            let first = free(count).unwrap();
            for port in first..first + count {
                assert!(port < ephemeral_begin(), "{port}");
                assert!(seen.insert(port), "{port} was given twice");
            }
        }
        assert!(free(u16::MAX).is_err());
    }

    #[test]
    fn a_port_that_somebody_has_is_passed_over() {
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, free(1).unwrap())).unwrap();
        let taken = held.local_addr().unwrap().port();
        let found = search(2, u16::MAX, &mut Some(taken)).unwrap();
        assert!(found > taken, "{found}");
    }
}
