//! Hosts: network namespaces with a device each, kept by a process that sleeps.

use std::fs::{self, File};
use std::io;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::chaos::site::run;
use crate::chaos::switch::{self, MTU};
use crate::cluster::{PATIENCE, wait_for};

/// A host: the process that keeps its network.
pub(super) struct Host {
    pub(super) keeper: Child,
}

/// A host's address.
pub(super) fn ip(host: u8) -> String {
    format!("10.77.0.{host}")
}

/// Names the device's addresses and everybody else's hardware addresses, so that nobody has to ask for them.
pub(super) fn configure(enter: &[String], host: u8, all: &[u8]) -> anyhow::Result<()> {
    let mut script = format!(
        "ip link set lo up; ip link set eth0 address {} mtu {MTU}; ip addr add {}/24 dev eth0; ip link set eth0 up\n",
        switch::address(host),
        ip(host)
    );
    for other in all.iter().filter(|other| **other != host) {
        let line =
            format!("ip neigh replace {} lladdr {} dev eth0 nud permanent\n", ip(*other), switch::address(*other));
        script.push_str(&line);
    }
    let mut argv = enter.to_vec();
    argv.extend(["sh", "-euc", &script].map(str::to_owned));
    run(Command::new(&argv[0]).args(&argv[1..]))?;
    Ok(())
}

/// What runs a command on a host.
pub(super) fn enter(host: &Host) -> Vec<String> {
    vec!["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", host.keeper.id())]
}

/// Starts a host and makes its device.
pub(super) fn start_host() -> anyhow::Result<(Host, File)> {
    let keeper = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "86400"])
        .stdin(Stdio::null())
        .spawn()?;
    let path = format!("/proc/{}/ns/net", keeper.id());
    let own = fs::read_link("/proc/self/ns/net")?;
    wait_for("a host's network", PATIENCE, || fs::read_link(&path).is_ok_and(|network| network != own).then_some(()));
    let network = File::open(&path)?;
    // A thread of its own, which ends in that network.
    let device = std::thread::spawn(move || {
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&network), Some(LinkNameSpaceType::Network))?;
        switch::tap()
    });
    let device = device.join().map_err(|_| io::Error::other("a thread panicked"))??;
    Ok((Host { keeper }, device))
}
